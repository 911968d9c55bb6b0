"""The files that people train from, one kind a file: what each asks for, as a recipe's options.

A file defines ``RUNFILE``. Which kind a file is, its own keys say, not its name. Of every key there is one
thing known: it moves memory and is understood; it moves memory and memplan can't follow it, so the file is
refused, or the plan says what is left out; or it moves none, and is listed as ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan import rooms, stacks
from memplan.errors import MemplanError, RecipeError, printable, shown
from memplan.runfiles._document import document
from memplan.runfiles._keys import Keys

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe
    from memplan.asked.spec import ModelSpec

Lines = Mapping[str, Any]  # keys and values, as a file has them


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A kind of file.

    ``title``: what people call it; ``own``: keys that no other kind has; ``holds``: tells it by more than
    one key's name; ``read``: takes the keys that move memory; ``refuses``: those that ask for what memplan
    does not plan, each with what is to be said of it; ``ignored``: those that are known to move none;
    ``launch``: what runs it, with FILE for its name; ``says``: how it says a value of a recipe's field, None
    where it can't; ``unsaid``: fields whose change it need not say (they follow from others); ``binding``:
    those that may not be given otherwise beside it.
    """

    title: str
    read: Callable[[Keys], None]
    launch: str
    own: frozenset[str] = frozenset()
    refuses: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    holds: Callable[[Mapping[str, Any]], bool] | None = None
    says: Mapping[str, Callable[[Any], Lines | None]] = field(default_factory=dict)
    unsaid: frozenset[str] = frozenset({"lora_alpha", "momentum"})
    binding: frozenset[str] = frozenset()

    def sayable(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """A change of a recipe without what the file leaves to its trainer; None where it can't say it."""
        kept = {name: value for name, value in fields.items() if name not in self.unsaid}
        if "mode" in kept and self._said("autocast", False) is None:
            kept.pop("autocast", None)  # its trainer's matter
        if any(name not in BESIDE and self._said(name, value) is None for name, value in kept.items()):
            return None
        return {name: fields[name] for name in fields if name in kept or name in self.unsaid}

    def change(self, fields: Mapping[str, Any], before: Recipe) -> str:
        """A sayable change as lines of the file."""
        if "mode" in fields and before.mode.value == "full":
            fields = {**fields, **{name: getattr(type(before)(), name) for name in ("r", "target_modules")}}
        lines: dict[str, Any] = {}
        for name, value in fields.items():
            lines |= self._said(name, value) or {}
        beside = [BESIDE[name](value) for name, value in fields.items() if name in BESIDE]
        return "; ".join([*(f"{key}: {_written(value)}" for key, value in lines.items()), *beside])

    def contradicted(self, own: Mapping[str, Any], beside: Mapping[str, Any]) -> list[str]:
        """Fields that are given otherwise ``beside`` the file than in its ``own`` options, and may not be."""
        both = self.binding & own.keys() & beside.keys()
        return sorted(name for name in both if own[name] != beside[name])

    def _said(self, name: str, value: Any) -> Lines | None:
        return self.says[name](value) if name in self.says else None


# what no file says, but the shell that the run is started from
BESIDE: Mapping[str, Callable[[Any], str]] = {
    "alloc_conf": lambda value: f"export PYTORCH_ALLOC_CONF={value}"
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a file asks for.

    ``name`` and ``path``: the file's; ``kind``: of file; ``model``: None where it holds none; ``options``:
    the recipe's by field, as the file gives them; ``stack``: its kind's
    own defaults by mode; ``understood``: the keys that moved these, with their values; ``ignored``: keys
    that move no memory; ``left_out``: where the run differs from its plan; ``evaluates``: the
    batch of its evaluations, 0 where it makes none, None where nobody knows.
    """

    name: str
    path: str
    kind: str
    model: str | None
    options: Mapping[str, Any]
    stack: Mapping[str, Mapping[str, Any]]
    understood: Mapping[str, Any]
    ignored: tuple[str, ...]
    left_out: tuple[str, ...]
    evaluates: int | None = None

    @property
    def mode(self) -> str | None:
        """The mode that the file asks for, if it does."""
        mode: str | None = self.options.get("mode")
        return mode

    @property
    def told(self) -> str:
        """A sentence on how much of it was read."""
        rest = "; ".join(self.left_out) or "all of it"
        return f"read from {self.name} ({find(self.kind).title}): {rest}"

    def recipe(self, given: Recipe | None = None) -> Recipe:
        """The recipe that it amounts to; what ``given`` was given overrides it. Raises RecipeError."""
        from memplan.asked.recipe import OF_SEVERAL, Mode, Recipe, recipe_options

        over = {} if given is None else {name: getattr(given, name) for name in given.model_fields_set}
        for name in find(self.kind).contradicted(self.options, over):
            raise RecipeError(
                f"{self.name} says {name} {self.options[name]}, and {over[name]} is given beside it, "
                f"which {find(self.kind).title} refuses: leave one of them out"
            )
        mode = Mode(over.get("mode", self.options.get("mode", Mode.QLORA)))
        own = dict(self.options)
        if over.get("parallel", own.get("parallel")) != own.get("parallel"):
            own = {name: value for name, value in own.items() if name not in OF_SEVERAL}
        if "gpus" in over:
            own.pop("nodes", None)
        options = {**self.stack.get(mode.value, {}), **own, **over, "mode": mode}
        known = recipe_options()
        foreign = [name for name in options if mode.value not in known[name].modes and name not in over]
        if options.get("gradient_checkpointing") is False and "use_reentrant" not in over:
            foreign.append("use_reentrant")
        try:
            return Recipe(**{name: value for name, value in options.items() if name not in foreign})
        except RecipeError as error:
            raise RecipeError(f"{self.name}: {error}") from None

    def suited(self, recipe: Recipe, spec: ModelSpec, given: Recipe | None = None) -> Recipe:
        """The same of this model. ``given`` as in :meth:`recipe`, from which ``recipe`` is. Raises
        MemplanError where the trainer does with the model what memplan can't."""
        if not spec.num_experts or self.kind not in ("axolotl", "llama_factory"):
            return recipe
        if self.kind == "axolotl" and recipe.mode.value == "qlora":
            raise MemplanError(
                f"{self.name}: axolotl leaves a mixture's experts in float32 after kbit preparation "
                f"(loaders/model.py), which memplan does not plan; {_instead(find(self.kind), self.path)}"
            )
        named = given is not None and "target_modules" in given.model_fields_set
        if recipe.target_modules == "all-linear" and recipe.mode.value != "full" and not named:
            # both list the names of linear layers, and transformers 5 has experts in none
            said = {name: getattr(recipe, name) for name in recipe.model_fields_set}
            return type(recipe)(**{**said, "target_modules": "attention"})
        return recipe


def find(name: str) -> RunFile:
    """The kind of that name. Raises UnknownName."""
    kind: RunFile = rooms.thing("runfiles", name, "RUNFILE", "kind of file")
    return kind


def reads(model: str | Path) -> bool:
    """Whether this is the path of what may be a run file, by its name: looked at before anything is read."""
    return str(model).endswith((".yaml", ".yml", ".json"))


def read(path: str | Path, *, named: int = 0) -> Reading | None:
    """What the file asks for; None where there is none of that name, or where it is a model's configuration.

    ``named``: how many files name it, one the other.

    Raises MemplanError with one sentence for a file that is no run file or asks for what can't be planned.
    """
    found = document(path)
    if found is None or (str(path).endswith(".json") and {"architectures", "model_type"} & found.keys()):
        return None
    name, place = printable(Path(path).name), printable(str(path))
    kind = _kind(found, name, str(path))
    if kind is None:
        return None
    runfile = find(kind)
    keys = Keys(name, found, lambda: _instead(runfile, place), runfile.title)
    keys.refuse_any(runfile.refuses)
    runfile.read(keys)
    keys.finish(runfile.ignored)
    reading = Reading(
        name=name,
        path=place,
        kind=kind,
        model=keys.model,
        options=keys.options,
        stack=keys.sizes,
        understood=keys.understood,
        ignored=tuple(keys.ignored),
        left_out=tuple(keys.left_out),
        evaluates=keys.evaluates,
    )
    return reading if keys.beside is None else _beside(reading, *keys.beside, named + 1)


_MOST_NAMED = 2  # a trainer's file names accelerate's, and that DeepSpeed's
LAUNCHERS = ("accelerate", "deepspeed")  # whose files say where a run runs, not what it is


def together(one: Reading, other: Reading) -> Reading:
    """What a trainer's file and that of what launches it ask for. Raises MemplanError."""
    run, launched = (other, one) if one.kind in LAUNCHERS else (one, other)
    if run.kind in LAUNCHERS or launched.kind not in LAUNCHERS:
        raise MemplanError(
            f"{one.name} and {other.name} are of one kind: one may be a trainer's, and one accelerate's or "
            "DeepSpeed's"
        )
    if run.model is None:
        raise MemplanError(
            f"{run.name} ({find(run.kind).title}) names no model: give one in its place, and one of the files"
        )
    return _joined(run, launched)


def _joined(run: Reading, launched: Reading) -> Reading:
    launcher = find(launched.kind)
    for name in launcher.contradicted(launched.options, run.options):
        raise MemplanError(
            f"{run.name} says {name} {run.options[name]} and {launched.name} {launched.options[name]}, "
            f"which {launcher.title} refuses"
        )
    return replace(
        run,
        name=f"{run.name} and {launched.name}",
        options={**run.options, **launched.options},
        understood={**run.understood, **launched.understood},
        ignored=(*run.ignored, *launched.ignored),
        left_out=(*run.left_out, *launched.left_out),
    )


def _beside(reading: Reading, key: str, path: str, named: int) -> Reading:
    """The same with another file that it names, from where it is run or from where it lies. Raises
    MemplanError."""
    if named > _MOST_NAMED:
        raise MemplanError(f"{reading.name}: {key}: one file names the other in a ring")
    try:
        here = Path(path).is_file()
        found = read(path if here else Path(reading.path).expanduser().parent / path, named=named)
    except (OSError, ValueError, RuntimeError):  # no name of a file
        found = None
    if found is None:
        raise MemplanError(
            f"{reading.name}: {key}: {printable(path[:60])} is not there: run memplan where it is, or ask "
            "about that file with --config"
        )
    if found.kind not in LAUNCHERS:
        raise MemplanError(f"{reading.name}: {key}: {found.name} is of {find(found.kind).title}")
    return _joined(reading, found)


def sizes(trainer: str, fields: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """A trainer's own files' defaults by mode; of these fields, if they are named."""
    found: dict[str, dict[str, Any]] = {mode: {} for mode in ("full", "lora", "qlora")}
    for name, setting in stacks.find(trainer).sizes.items():
        if fields is None or name in fields:
            for mode, value in setting.by_mode.items():
                found[mode][name] = value
    return found


def _instead(runfile: RunFile, name: str) -> str:
    return f"`memplan dry-run --gpu NAME -- {runfile.launch.replace('FILE', name)}` runs it as it is"


def _kind(found: Mapping[str, Any], name: str, path: str) -> str | None:
    """Which kind it is. Raises MemplanError if it is none, or of two."""
    kinds = {kind: find(kind) for kind in rooms.names("runfiles")}
    told = [kind for kind, runfile in kinds.items() if runfile.holds is not None and runfile.holds(found)]
    if told:
        return told[0]
    marks = {kind: [key for key in found if key in runfile.own] for kind, runfile in kinds.items()}
    marked = {kind: keys for kind, keys in marks.items() if keys}
    # every trainer that is built on the HF Trainer has its arguments, too, and TRL's files accelerate's
    for beneath in ("training_arguments", "accelerate"):
        if len(marked) > 1 and (beneath != "accelerate" or "trl" in marked):
            marked.pop(beneath, None)
    if len(marked) > 1:
        (one, mine), (other, theirs), *_ = sorted(marked.items(), key=lambda item: -len(item[1]))
        raise MemplanError(
            f"{name} has keys of two trainers: {mine[0]} is {find(one).title}'s, {theirs[0]} is "
            f"{find(other).title}'s"
        )
    if marked:
        return next(iter(marked))
    if path.endswith(".json"):
        return None  # its reader says what is wrong with a configuration
    known = ", ".join(runfile.title for runfile in kinds.values() if runfile.own)
    raise MemplanError(f"{name} has no key that would tell whose it is; memplan reads files of {known}")


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool) or value is None:
        return shown(value)
    return str(value)
