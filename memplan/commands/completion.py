"""``memplan completion SHELL``: a script that completes commands, options, models and cards.

The script holds every word that it can complete, so that pressing Tab starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from memplan.commands.arguments import Parser, add_switch, completions
from memplan.streams import say

EXAMPLES = """\
examples:
  eval "$(memplan completion bash)"           (in ~/.bashrc)
  eval "$(memplan completion zsh)"            (in ~/.zshrc, after compinit)
  memplan completion fish > ~/.config/fish/completions/memplan.fish
"""


def parser() -> Parser:
    """The arguments that ``memplan completion`` takes."""
    result = Parser("completion", "Prints a completion script.", "SHELL", EXAMPLES)
    result.add_argument("shell", metavar="SHELL", choices=sorted(_WRITERS), help="bash, zsh or fish")
    add_switch(result, "--json", "the same words as JSON")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the script; 0."""
    commands = _commands()
    if arguments.json:
        from dataclasses import asdict

        from memplan.report.machine import print_list

        print_list("commands", [asdict(command) for command in commands])
    else:
        say(_WRITERS[arguments.shell](commands))
    return 0


@dataclass(frozen=True)
class _Option:
    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Command:
    """A subcommand: its options, and the words that may stand for its positional argument."""

    name: str
    options: tuple[_Option, ...]
    words: tuple[str, ...]


def _commands() -> list[Command]:
    from memplan.asked.gpus import load_gpus
    from memplan.commands import COMMANDS, module_of
    from memplan.importers.registry import registry

    listed = {
        "model": tuple(name for entry in registry() for name in (entry.alias, *entry.aliases)),
        "gpu": tuple(alias for gpu in load_gpus() for alias in gpu.aliases),
    }

    def values(action: argparse.Action) -> tuple[str, ...]:
        return listed.get(action.dest) or tuple(completions(action))

    commands = []
    for name in COMMANDS:
        actions = import_module(module_of(name)).parser()._actions
        options = tuple(
            _Option(tuple(action.option_strings), action.nargs != 0, values(action), action.help or "")
            for action in actions
            if action.option_strings
        )
        words = tuple(word for action in actions if not action.option_strings for word in values(action))
        commands.append(Command(name, options, words))
    return commands


def _by_value(commands: Iterable[Command]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The values of each option that takes one; an option means the same in every command."""
    return {
        option.names: option.values
        for command in commands
        for option in command.options
        if option.takes_value
    }


def _cases(commands: list[Command], command_word: str) -> str:
    """The shell code that sets ``candidates``; bash and zsh read the same."""
    lines = ["    case $previous in"]
    for names, values in _by_value(commands).items():
        lines.append(f"        {'|'.join(names)}) candidates={shlex.quote(' '.join(values))} ;;")
    lines.append(f"        *) case {command_word}:$current in")
    for command in commands:
        options = " ".join(name for option in command.options for name in option.names)
        lines.append(f"            {command.name}:-*) candidates={shlex.quote(options)} ;;")
        lines.append(f"            {command.name}:*) candidates={shlex.quote(' '.join(command.words))} ;;")
    lines += ["        esac ;;", "    esac"]
    return "\n".join(lines)


def _bash(commands: list[Command]) -> str:
    names = [command.name for command in commands]
    return f"""\
# Completion of memplan for bash. In ~/.bashrc: eval "$(memplan completion bash)"
_memplan() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=plan candidates=
    if [[ $COMP_CWORD -gt 1 ]]; then
        case ${{COMP_WORDS[1]}} in {"|".join(names)}) command=${{COMP_WORDS[1]}} ;; esac
    fi
{_cases(commands, "$command")}
    if [[ $COMP_CWORD -eq 1 ]]; then candidates="$candidates {" ".join(names)} --help --version"; fi
    COMPREPLY=($(compgen -W "$candidates" -- "$current"))
}}
complete -o default -F _memplan memplan
"""


def _zsh(commands: list[Command]) -> str:
    names = [command.name for command in commands]
    return f"""\
#compdef memplan
# Completion of memplan for zsh. In ~/.zshrc, after compinit: eval "$(memplan completion zsh)"
_memplan() {{
    local current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}} command=plan candidates=
    if (( CURRENT > 2 )); then
        case ${{words[2]}} in {"|".join(names)}) command=${{words[2]}} ;; esac
    fi
{_cases(commands, "$command")}
    if (( CURRENT == 2 )); then candidates="$candidates {" ".join(names)} --help --version"; fi
    compadd -- ${{=candidates}} || _files
}}
compdef _memplan memplan
"""


def _fish(commands: list[Command]) -> str:
    names = [command.name for command in commands]
    lines = [
        "# Completion of memplan for fish: memplan completion fish > ~/.config/fish/completions/memplan.fish",
        "function __memplan_command",
        "    set -l words (commandline -opc)",
        "    set -l command plan",
        f"    if set -q words[2]; and contains -- $words[2] {' '.join(names)}",
        "        set command $words[2]",
        "    end",
        "    test $command = $argv[1]",
        "end",
        f"complete -c memplan -n 'test (count (commandline -opc)) -eq 1' -a '{' '.join(names)}'",
        "complete -c memplan -n 'test (count (commandline -opc)) -eq 1' -l version",
    ]
    for command in commands:
        condition = f"complete -c memplan -n '__memplan_command {command.name}'"
        if command.words:
            lines.append(f"{condition} -a '{' '.join(command.words)}'")
        for option in command.options:
            told = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
            )
            values = ""
            if option.takes_value:  # fish completes files where no words are listed
                values = f" -x -a '{' '.join(option.values)}'" if option.values else " -r"
            lines.append(f"{condition} {told}{values} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_WRITERS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
