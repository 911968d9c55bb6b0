"""Docs that cannot drift: the README's blocks are run, generated pages are current, tables match the code."""

from __future__ import annotations

import importlib
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pydantic
import pytest
from conftest import Outcome
from programs import load

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.verify.measurement import read_all

ROOT = Path(__file__).parent.parent
README, START = ROOT / "README.md", ROOT / "docs" / "start.md"
BLOCK = re.compile(r"^```(console|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, page: Path = README) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path = README) -> list[tuple[str, str]]:
    """Each `$ command` of a page with the output shown below it."""
    return [
        (command, shown)
        for block in blocks("console", page)
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


def test_the_readme_counts_gpus_as_the_program_does(memplan: Callable[..., Outcome]) -> None:
    (block,) = (text for text in blocks("text") if "--how-many\n" in text)
    typed, _, shown = block.partition("\n")
    assert typed.startswith("$ memplan ")
    assert memplan(*shlex.split(typed)[2:]).out.startswith(shown)


def test_the_readme_opens_with_two_commands() -> None:
    (setup, _), (tests, _), *_ = commands()
    assert README.read_text(encoding="utf-8").index(tests) < 700
    assert setup.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert setup.endswith(" && .venv/bin/memplan llama-70b --mode qlora --r 8")
    assert tests.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert tests.endswith(" && .venv/bin/pytest")


def test_ci_runs_the_readmes_second_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in script.splitlines() if "$venv" in line]
    run = [[word.replace("$venv", ".venv") for word in line if word != "--quiet"] for line in lines]
    for part in commands()[1][0].split(" && "):
        assert any(line[: len(shlex.split(part))] == shlex.split(part) for line in run), part


@pytest.mark.parametrize(
    ("page", "command"),
    [
        (page, typed)
        for page in (README, START)
        for typed, _ in commands(page)
        if typed.startswith("memplan ")
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_commands_print_what_pages_show(
    page: Path,
    command: str,
    memplan: Callable[..., Outcome],
    update_golden: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for typed, shown in commands(page):
        if typed.startswith("cat "):
            Path(typed.removeprefix("cat ")).write_text(shown, encoding="utf-8")
    outcome = memplan(*shlex.split(command.partition(" >> ")[0])[1:])
    assert outcome.status in (0, 1)
    printed = outcome.err + outcome.out  # as a terminal has it: remarks stand before the answer
    if ">>" in command:
        return
    if update_golden:
        before, after = (f"$ {command}\n{text}" for text in (dict(commands(page))[command], printed))
        page.write_text(page.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    assert dict(commands(page))[command] == printed, "renew: pytest --update-golden"


def test_the_first_page_leads_to_all_it_names_and_the_readme_to_it() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", START.read_text(encoding="utf-8"))
    assert {"claims.md", "cli.md", "verify.md"} <= set(targets)
    assert all((START.parent / target).exists() for target in targets)
    assert "](docs/start.md)" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_readmes_python_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[number], "README.md", "exec"), {})
    assert capsys.readouterr().out


def generator() -> ModuleType:
    return load("generate", ROOT / "docs" / "generate.py")


@pytest.mark.parametrize(
    "page",
    [
        "cli.md",
        "claims.md",
        "dry-run.md",
        "recipe.md",
        "answers.schema.json",
        "plan.schema.json",
        "measurement.schema.json",
        "dry-run.schema.json",
    ],
)
def test_generated_pages_are_current(page: str) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if page.endswith(".json") and f"pydantic=={pydantic.VERSION}" not in pins:
        pytest.skip("other releases of pydantic word the schema in other ways")
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generator().PAGES[page](), "renew: python docs/generate.py"


def plain(page: str) -> str:
    """The text without its line breaks."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_what_was_measured_on_gpus_is_told_alike() -> None:
    """The records' own numbers, wherever they are told."""
    generator()  # finds the modules of docs/
    measured = importlib.import_module("measured")
    for page in ("README.md", "CHANGELOG.md", "docs/accuracy.md", "docs/fit.md", "docs/verify.md"):
        assert measured.summary() in plain(page), f"{page}: {measured.summary()}"
    assert measured.section() in (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8"), (
        "docs/generate.py"
    )
    runs = [run for _, run in read_all(ROOT / "data" / "measurements") if run.device.kind == "cuda"]
    peak = next(run.steady for run in runs if run.run.campaign == "70b-qlora")
    assert f"A 70B trained in QLoRA: {peak.allocated_bytes:,} bytes predicted" in plain("README.md")
    capped = {run.run.campaign: run.outcome.kind for run in runs if run.run.cap_name == "NVIDIA RTX A6000"}
    assert capped == {
        "70b-qlora-48gb-with-upcasts": "out of memory", "70b-qlora-48gb-without-upcasts": "trained"
    }  # fmt: skip
    assert "the first ran out of memory and the second trained" in plain("README.md")
    last = [run.steps[-1] for run in runs if run.steps and run.steps[-1].process_bytes]
    # where nothing of the most that was reserved was given back before the driver was asked
    last = [step for step in last if step.process_bytes >= step.reserved_bytes]
    beside = Counter((step.process_bytes - step.reserved_bytes) >> 20 for step in last)
    (most, count), *others = beside.most_common()
    told = f"{most} MiB in {count} of {len(last)} runs, " + "(.*?)".join(
        f"{mib} in {n} " for mib, n in sorted(others)
    )
    assert re.search(told, plain("docs/fit.md")), told


def test_the_table_of_defaults_is_the_codes() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \| .+ \|$", text, re.MULTILINE))
    recipe = Recipe().resolved()
    values = {field: getattr(recipe, field) for field in Recipe.model_fields}
    assert told == {field: str(getattr(value, "value", value)) for field, value in values.items()}


def test_every_optimizer_and_attention_is_documented() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"`{optimizer}`" in text for optimizer in rooms.names("optimizers"))
    assert all(attention in reference for attention in rooms.names("attention"))


@pytest.mark.parametrize("page", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_every_dependency_says_why() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|verify|losses|dev) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r'"([a-z_-]+)', "".join(lists))) - {"memplan"}
    assert {"pydantic", "rich", "torch", "trl", "liger-kernel", "huggingface_hub", "pytest"} <= names
    assert all(f"| {name} |" in text for name in names)
