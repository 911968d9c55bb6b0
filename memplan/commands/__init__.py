"""The subcommands, one module each: ``parser()`` says what it takes, ``run(arguments)`` answers."""

COMMANDS = (
    "plan",
    "fit",
    "frontier",
    "compare",
    "trace",
    "dry-run",
    "stub",
    "verify",
    "campaign",
    "report",
    "diff",
    "models",
    "gpus",
    "completion",
)


def module_of(command: str) -> str:
    """The full name of a subcommand's module."""
    return f"memplan.commands.{command.replace('-', '_')}"
