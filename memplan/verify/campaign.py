"""A campaign: runs as data, the most informative first, and how long each may take. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memplan.asked.recipe import Recipe
from memplan.bounded import TooManyParts, read_yaml
from memplan.errors import MemplanError, first_complaint, reason, shown
from memplan.verify.job import Job, cap, gets_through, make_job, recipe_of
from memplan.verify.measurement import SEEDS, Measurement, Run, read_all

_MAX_BYTES = 256 << 10  # benchmarks/campaign.yaml, of 60 runs, has 9 KiB; PyYAML reads 100 KiB a second


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Record):
    """One run, or, with ``frontier``, two: the largest value of that option which is predicted to fit under
    the cap, and the next. ``seconds``: how long it takes, where that is known better than by the estimate."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    model: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    priority: int = 100
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    device: Literal["cuda", "cpu"] | None = None
    layers: int | None = None
    weights: str | None = None
    steps: int | None = Field(default=None, ge=2, le=1 << 24)
    seed: int | None = Field(default=None, ge=0, lt=SEEDS)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    loop: Literal["memplan", "trainer", "sft"] = "memplan"
    cap: str | None = None
    cudnn_attention: bool | None = None
    anyway: bool = False
    frontier: Literal["batch_size", "seq_len"] | None = None
    step_of: int = Field(default=1, ge=1, le=1 << 24)  # by how much the frontier's option grows


class Defaults(_Record):
    """What entries leave out."""

    device: Literal["cuda", "cpu"] = "cuda"
    steps: int = Field(default=3, ge=2, le=1 << 24)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    cudnn_attention: bool = True


class Plan(_Record):
    """A campaign's file."""

    about: str = ""
    defaults: Defaults = Defaults()
    runs: tuple[Entry, ...] = Field(min_length=1)


class Planned(_Record):
    """A run that is ready to go. ``seconds`` is an estimate."""

    name: str
    priority: int
    job: Job
    seconds: float

    @property
    def key(self) -> str:
        """What makes a measurement one of this run."""
        return fingerprint(self.job.device, self.job)


def load(path: Path) -> Plan:
    """Read a campaign. Raises MemplanError with one sentence for whatever else the file holds."""
    where = shown(str(path))
    try:
        import yaml
    except ImportError:
        raise MemplanError("campaigns are YAML, which needs PyYAML: run `pip install pyyaml`") from None
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise MemplanError(f"{where} is larger than {_MAX_BYTES >> 10} KiB, so it is no campaign")
        document = read_yaml(content.decode("utf-8"))
    except TooManyParts as error:
        raise MemplanError(f"{where} is no campaign: {error}") from None
    except (OSError, ValueError) as error:
        raise MemplanError(f"the campaign {where} can't be read: {reason(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise MemplanError(f"{where} is no valid YAML{line}") from None
    try:
        plan = Plan.model_validate(document)
    except ValidationError as error:
        place, what = first_complaint(error)
        raise MemplanError(f"{where} is no campaign: {place or 'it'}: {what}") from None
    names = [entry.name for entry in plan.runs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise MemplanError(f"{where} has two runs of the name {double!r}")
    return plan


def expand(plan: Plan, device: str | None = None) -> list[Planned]:
    """The runs in the order of the campaign: by priority, then as they stand. ``device`` overrules."""
    planned = [run for entry in plan.runs for run in _named(entry, plan.defaults, device)]
    return sorted(planned, key=lambda run: run.priority)


def _named(entry: Entry, defaults: Defaults, device: str | None) -> list[Planned]:
    try:
        return _expand(entry, defaults, device)
    except MemplanError as error:
        raise MemplanError(f"run {entry.name!r}: {error}") from None


def _expand(entry: Entry, defaults: Defaults, device: str | None) -> list[Planned]:
    recipe = recipe_of(entry.loop, _tuples(entry.recipe))
    if entry.frontier is None:
        return [_planned(entry, entry.name, recipe, defaults, device)]
    fits = frontier(entry, recipe, defaults, device)
    option, step = entry.frontier, entry.step_of
    return [
        _planned(
            entry.model_copy(update={"anyway": True}),
            f"{entry.name}-{what}-{option}-{value}",
            recipe_of(entry.loop, {**_tuples(entry.recipe), option: value}),
            defaults,
            device,
        )
        for what, value in (("fits", fits), ("next", fits + step))
        if value >= 1
    ]


def frontier(entry: Entry, recipe: Recipe, defaults: Defaults, device: str | None) -> int:
    """The largest value of the entry's option that is predicted to train under its cap, in its steps, while
    the next one is not."""
    assert entry.frontier is not None
    option, step = entry.frontier, entry.step_of
    if entry.cap is None:
        raise MemplanError("a frontier needs a cap")
    job = _job(entry, entry.name, recipe, defaults, device)
    room = job.run.cap_bytes
    assert room is not None

    def fits(times: int) -> bool:
        return gets_through(job.model, recipe.model_copy(update={option: times * step}), room)

    if not fits(1):
        raise MemplanError(f"not even {option} {step} is predicted to fit")
    most = 2
    while fits(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least * step


def _planned(entry: Entry, name: str, recipe: Recipe, defaults: Defaults, device: str | None) -> Planned:
    job = _job(entry, name, recipe, defaults, device)
    return Planned(name=name, priority=entry.priority, job=job, seconds=entry.seconds or estimate(job))


def _job(entry: Entry, name: str, recipe: Recipe, defaults: Defaults, device: Any) -> Job:
    cap_bytes, cap_name = (None, None) if entry.cap is None else cap(entry.cap)

    def value(field: str) -> Any:
        own = getattr(entry, field)
        return getattr(defaults, field) if own is None else own

    run = Run(
        loop=entry.loop,
        steps=value("steps"),
        seed=value("seed"),
        learning_rate=value("learning_rate"),
        cap_bytes=cap_bytes,
        cap_name=cap_name,
        cudnn_attention=value("cudnn_attention"),
        campaign=name,
    )
    return make_job(
        entry.model,
        recipe,
        run,
        device=device or value("device"),
        layers=entry.layers,
        weights=entry.weights,
        anyway=entry.anyway,
    )


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


# -- time --------------------------------------------------------------------------------------------------

# Assumed, not measured: seconds to import and to make a CUDA context, parameters a second to make and
# quantise, floating-point operations a second. Entries may say `seconds`, and runs that are done correct the
# rest (:func:`slowness`).
_START = {"cuda": 30.0, "cpu": 12.0}
_BUILT = {"cuda": 1e9, "cpu": 5e7}
_SPEED = {"cuda": 1e14, "cpu": 2e10}


def estimate(job: Job) -> float:
    """Seconds that a run may take: 8 operations a parameter, token and pass (forward, recomputation,
    backward)."""
    from memplan.predict.parameters import count
    from memplan.verify.job import spec_of

    parameters = sum(count(spec_of(job.model), job.recipe)[:2])
    passes = job.run.steps * job.recipe.gradient_accumulation_steps
    tokens = job.recipe.batch_size * job.recipe.seq_len * passes
    kind = job.device
    return _START[kind] + parameters / _BUILT[kind] + 8 * parameters * tokens / _SPEED[kind]


def slowness(done: list[tuple[float, float]]) -> float:
    """By how much estimates have to be stretched, from pairs of estimated and real seconds: the worst seen,
    never less than 1."""
    return max([1.0, *(real / estimated for estimated, real in done)])


# A run is assumed to hang that takes so many times as long as its estimate, and so many seconds at least.
_PATIENCE, _LEAST_PATIENCE = 5.0, 120.0


def patience(seconds: float) -> float:
    """After how many seconds a run is ended that should take so many."""
    return max(_PATIENCE * seconds, _LEAST_PATIENCE)


# -- what is done already ----------------------------------------------------------------------------------


def fingerprint(device: str, run: Job | Measurement) -> str:
    """The same for a job and the measurements that it makes; records of before 4-bit layers' dtype was
    resolved have none."""
    what = {
        "device": device,
        "model": run.model.model_dump(mode="json"),
        "recipe": run.recipe.resolved().model_dump(mode="json"),
        "run": run.run.model_dump(mode="json", exclude={"settings", "campaign"}),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def done(folder: Path, skipped: Callable[[str], None] | None = None) -> dict[str, Measurement]:
    """The measurements of a folder by fingerprint; of several the last. A run that failed has none: whatever
    was wrong may have been mended. ``skipped`` as for :func:`memplan.verify.measurement.read_all`."""
    files = read_all(folder, skipped) if folder.is_dir() else ()
    found = (m for _, m in files if m.outcome.kind != "failed")
    return {fingerprint(m.device.kind, m): m for m in found}
