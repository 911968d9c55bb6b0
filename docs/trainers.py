"""docs/trainers.md, from memplan/stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from memplan import rooms, stacks
from memplan.asked.options import SHORT_DTYPES
from memplan.asked.recipe import Recipe, recipe_options
from memplan.parts import loop
from memplan.stacks import Setting, Stack

TEMPLATE = Path(__file__).parent / "templates" / "trainers.md"
MODES = ("full", "lora", "qlora")


def page() -> str:
    """The page."""
    known = {name: stacks.find(name) for name in _order()}
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("{head}", " | ".join(f"`{name}`" for name in known))
        .replace("{line}", " | ".join("---" for _ in known))
        .replace("{settings}\n", _rows(known, lambda stack: stack.settings) + _reentrance(known))
        .replace("{sizes}\n", _rows(known, lambda stack: stack.sizes))
        .replace("{kept}\n", _kept(known))
        .replace("{sources}\n", "".join(map(_sources, known, known.values())))
    )


def _order() -> list[str]:
    """The default first."""
    return sorted(rooms.names("stacks"), key=lambda name: (name != stacks.DEFAULT, name))


def _rows(known: Mapping[str, Stack], of: Callable[[Stack], Mapping[str, Setting]]) -> str:
    fields = [field for field in recipe_options() if any(field in of(stack) for stack in known.values())]
    return "".join(
        f"| `{field}` | {' | '.join(_cell(of(stack).get(field)) for stack in known.values())} |\n"
        for field in fields
    )


def _cell(setting: Setting | None) -> str:
    """A value, or one for each mode where they differ."""
    if setting is None:
        return "–"
    values = {mode: _shown(value) for mode, value in setting.by_mode.items()}
    if len(set(values.values())) == 1 and set(values) >= {"lora", "qlora"}:
        return next(iter(values.values()))
    by_value: dict[str, list[str]] = {}
    for mode, value in values.items():
        by_value.setdefault(value, []).append(mode)
    return "; ".join(f"{value} in {' and '.join(modes)}" for value, modes in by_value.items())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return SHORT_DTYPES.get(str(value), str(value))


def _reentrance(known: Mapping[str, Stack]) -> str:
    cells = []
    for name in known:
        kinds = {
            mode: "reentrant" if recipe.use_reentrant else "non-reentrant"
            for mode in MODES
            if (recipe := Recipe(trainer=name, mode=mode).resolved()).gradient_checkpointing
        }
        cells.append(_cell(Setting(source="", by_mode=kinds)))
    return f"| checkpoints | {' | '.join(cells)} |\n"


def _kept(known: Mapping[str, Stack]) -> str:
    of_all = {**loop.KEPT, **loop.SCALER, loop.WAITING: loop.BATCHES}
    rows = [f"| `{name}` | {source} |\n" for name, source in of_all.items()]
    rows += [
        f"| `{name}` | {stack.title}, {source} |\n"
        for stack in known.values()
        for name, source in stack.keeps.items()
    ]
    return "".join(rows)


def _sources(name: str, stack: Stack) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in stack.versions.items())
    lines = [f"- `{field}`: {setting.source}" for field, setting in stack.settings.items()]
    lines += [
        f"- `{field}` in its own files and commands: {setting.source}"
        for field, setting in stack.sizes.items()
    ]
    return f"### `{name}`: {stack.title}\n\n{versions}.\n\n" + "\n".join(lines) + "\n\n"
