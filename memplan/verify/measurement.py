"""One measured run as a record: what was run where, what was counted, and how it ended.

Files are written once and never changed. Everything in them was counted by the run itself; predictions are
made anew by whoever reads them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from memplan.asked.recipe import Recipe
from memplan.bounded import TooManyParts, read_json
from memplan.emulate.cards import DRY
from memplan.errors import MemplanError, first_complaint, reason, shown
from memplan.files import beside
from memplan.tape import Tape
from memplan.tape.file import TapeInfo, decode, encode

FORMAT = "memplan measurement"
SCHEMA_VERSION = 1  # of files that are read; the records' own fields say what is written


SEEDS = 1 << 63  # of torch.manual_seed

_MAX_BYTES = 64 << 20  # with the tape of 126 layers, compressed, it is 2 MiB


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Record):
    """What it ran on. ``total_bytes``: what PyTorch sees of the card, or the host's memory."""

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None = None
    total_bytes: NonNegativeInt
    multiprocessors: int | None = None
    driver: str | None = None


class Model(_Record):
    """Which model. ``layers``: to how many layers it was cut, if it was; ``weights``: "random", or where they
    came from; ``config`` is its whole configuration, cut."""

    name: str
    hub_id: str | None = None
    layers: PositiveInt | None = None
    weights: str = "random"
    config: dict[str, Any]


class Run(_Record):
    """How it was run, beside the recipe. ``cap_bytes``: the most that the allocator was let reserve;
    ``campaign``: the name it has in a campaign."""

    loop: Literal["memplan", "trainer", "sft"] = "memplan"
    steps: PositiveInt = 3
    seed: int = 0
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    text: str | None = None
    cap_bytes: PositiveInt | None = None
    cap_name: str | None = None
    cudnn_attention: bool = True
    campaign: str | None = None
    settings: dict[str, str] = Field(default_factory=dict)


class Step(_Record):
    """Counters of one step, in bytes. ``allocated_bytes``, ``requested_bytes`` and ``reserved_bytes`` are the
    step's peaks; ``resting_bytes`` is allocated after it; ``driver_bytes`` is in use on the whole card after
    it, by everybody, and ``process_bytes`` by this process, as the driver says. None: not to be had there."""

    number: PositiveInt
    loss: float | None = None
    seconds: float | None = None
    allocated_bytes: NonNegativeInt
    resting_bytes: NonNegativeInt
    requested_bytes: NonNegativeInt | None = None
    reserved_bytes: NonNegativeInt | None = None
    driver_bytes: NonNegativeInt | None = None
    process_bytes: NonNegativeInt | None = None
    alloc_retries: NonNegativeInt | None = None
    ooms: NonNegativeInt | None = None


class Evidence(_Record):
    """That it really trained: on one batch over and over the loss falls, what is trained changes, what is
    frozen does not, and gradients are finite. A loss that is no finite number is None."""

    first_loss: float | None
    last_loss: float | None
    trained_tensors: int
    changed_tensors: int
    frozen_tensors: int
    frozen_changed: int
    gradients_finite: bool

    @property
    def real(self) -> bool:
        """All of it."""
        return not self.doubts

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against it."""
        found = []
        if self.first_loss is None or self.last_loss is None:
            found.append("the loss is not finite")
        elif not self.last_loss < self.first_loss:
            found.append(f"the loss did not fall ({self.first_loss:.4f} to {self.last_loss:.4f})")
        if not self.changed_tensors:
            found.append("nothing that is trained changed")
        if self.frozen_changed:
            found.append(f"{self.frozen_changed} frozen tensors changed")
        if not self.gradients_finite:
            found.append("gradients are not finite")
        return tuple(found)


class OutOfMemory(_Record):
    """The allocation that did not fit: in which step (0: while the model was made), where, how many bytes
    the allocator asked the driver for (a whole segment), and how many were allocated and reserved then."""

    step: int
    phase: str
    module: str = ""
    requested_bytes: NonNegativeInt | None = None
    allocated_bytes: NonNegativeInt
    reserved_bytes: NonNegativeInt
    message: str = ""


class Outcome(_Record):
    """How it ended. ``why`` says it of a failure in one sentence."""

    kind: Literal["trained", "out of memory", "failed"]
    why: str | None = None
    event: OutOfMemory | None = None


class Rank(_Record):
    """What one of several processes that trained together counted, on its own card or in its own memory. Its
    ``tape`` is the measurement's, where the measurement is this rank's."""

    rank: NonNegativeInt
    outcome: Outcome
    steps: tuple[Step, ...] = ()
    evidence: Evidence | None = None
    baseline_driver_bytes: NonNegativeInt | None = None
    tape_step: int | None = None
    tape: str | None = None  # as the measurement's
    remarks: tuple[str, ...] = ()


class Measurement(_Record):
    """A run. Of several processes it is that of ``rank``, the first or the one that failed, and ``ranks`` has
    all of them."""

    format: Literal["memplan measurement"] = "memplan measurement"
    schema_version: Literal[1] = 1
    provenance: Literal["measured"] = "measured"
    counted: Literal["CUDA caching allocator", "CPU storages"]
    date: str
    memplan_version: str
    git_commit: str | None = None
    python: str
    platform: str
    libraries: dict[str, str]
    device: Device
    model: Model
    recipe: Recipe
    run: Run
    outcome: Outcome
    steps: tuple[Step, ...] = ()
    evidence: Evidence | None = None
    baseline_driver_bytes: NonNegativeInt | None = None
    tape_step: int | None = None
    tape: str | None = None  # a tape file, gzip, base64
    remarks: tuple[str, ...] = ()
    rank: NonNegativeInt = 0
    ranks: tuple[Rank, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether the card was one that is not there (memplan.emulate): allocations are real, nothing was
        computed."""
        return self.device.name.startswith(DRY)

    @property
    def label(self) -> str:
        """What these numbers may be called."""
        if self.emulated:
            return "emulated, no GPU"
        return "measured" if self.device.kind == "cuda" else "measured, CPU storages"

    @property
    def steady(self) -> Step | None:
        """The step to compare: the recorded one, else the last from the second on."""
        later = [step for step in self.steps if step.number >= 2]
        return next((step for step in later if step.number == self.tape_step), later[-1] if later else None)

    def read_tape(self) -> Tape | None:
        """The recorded step. Raises MemplanError if it is damaged."""
        if self.tape is None:
            return None
        try:
            content = base64.b64decode(self.tape, validate=True)
        except ValueError:
            raise MemplanError(f"the tape of the measurement {self.title} is damaged") from None
        return decode(content, f"of the measurement {self.title}")[0]

    def by_rank(self) -> Iterator[Measurement]:
        """What each of several processes would have measured by itself."""
        for one in self.ranks:
            own = {name: getattr(one, name) for name in Rank.model_fields}
            if one.rank == self.rank:
                own["tape"] = self.tape
            yield self.model_copy(update=own)

    @property
    def title(self) -> str:
        """The run in one line."""
        number = self.model.layers
        layers = f" ({number} layer{'s' if number > 1 else ''})" if number else ""
        recipe = self.recipe
        shape = f"{recipe.batch_size} × {recipe.seq_len}"
        spread = f", {recipe.parallel} on {recipe.gpus}" if recipe.gpus > 1 else ""
        return f"{self.model.name}{layers}, {recipe.mode.value}, {shape}{spread}"


def tape_of(document: Any, where: str) -> tuple[Tape, TapeInfo]:
    """The recorded step of a measurement's document. Raises MemplanError if it has none."""
    measured = parse(document, where)
    tape = measured.read_tape()
    if tape is None:
        raise MemplanError(f"the measurement {where} has no tape: its outcome is {measured.outcome.kind!r}")
    return tape, TapeInfo(
        memplan_version=measured.memplan_version,
        model=measured.model.hub_id or measured.model.name,
        recipe=measured.recipe.model_dump(mode="json"),
        libraries=measured.libraries,
    )


def packed(tape: Tape) -> str:
    """A tape as :attr:`Measurement.tape` has it."""
    return base64.b64encode(gzip.compress(encode(tape), mtime=0)).decode()


# -- files -------------------------------------------------------------------------------------------------


def write(measurement: Measurement, folder: Path) -> Path:
    """Add a file to the folder, as a whole or not at all; no file is ever replaced. Its path.

    Raises MemplanError with one sentence, for example of a full disk, or where an emulated run would stand
    among measured ones.
    """
    if measurement.emulated and folder.name == "measurements":
        raise MemplanError(
            "what a card that is not there shows is no measurement: give another folder, --out"
        )
    content = (measurement.model_dump_json(indent=1) + "\n").encode()
    path = folder / _name(measurement, content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside(folder, ".measurement.", content) as file:
            _place(file, path)
    except FileExistsError:
        raise MemplanError(
            f"{shown(str(path))} exists already, and measurements are never replaced"
        ) from None
    except (OSError, ValueError) as error:
        raise MemplanError(
            f"the measurement can't be written to {shown(str(folder))}: {reason(error)}"
        ) from None
    return path


def keep(measurement: Measurement, folder: Path) -> tuple[Path | None, str | None]:
    """Add a file to the folder, or where that can't be (a disk has filled up) to a new one for temporary
    files: what took long to measure is not lost. The path, and what went wrong in a sentence that says where
    the file is."""
    try:
        return write(measurement, folder), None
    except MemplanError as error:
        trouble = str(error)
    elsewhere = None
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="memplan-kept-"))
        path = write(measurement, elsewhere)
    except (MemplanError, OSError) as error:
        if elsewhere is not None:
            elsewhere.rmdir()
        return None, f"{trouble}; nor could it be kept elsewhere: {reason(error)}"
    return path, f"{trouble}; it is kept in {path}"


def make_ready(folder: Path) -> None:
    """See that files can be added to the folder, before time is spent on one. It is not made yet: the run may
    be refused. Raises MemplanError."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".measurement."):
            pass
    except (OSError, ValueError) as error:
        raise MemplanError(
            f"measurements can't be written to {shown(str(folder))}: {reason(error)}"
        ) from None


def _place(temporary: Path, path: Path) -> None:
    """Under its name, unless that is taken: a hard link fails then, and a rename would not."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # file systems without hard links have many words for that
        with path.open("xb"):
            pass
        try:
            temporary.replace(path)
        except OSError:
            path.unlink()
            raise


def _name(measurement: Measurement, content: bytes) -> str:
    parts = (
        re.sub(r"[-:]", "", measurement.date.partition("+")[0].partition(".")[0]),
        measurement.device.name if measurement.device.kind == "cuda" else "cpu",
        measurement.model.name.rpartition("/")[2],
        measurement.recipe.mode.value,
        hashlib.sha256(content).hexdigest()[:8],
    )
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.")[:60] or "x" for part in parts)
    return "_".join(words) + ".json"


def read(path: Path) -> Measurement:
    """A measurement. Raises MemplanError with one sentence for whatever else the file holds."""
    where = shown(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MemplanError(f"the measurement {where} can't be read: {reason(error)}") from None
    if len(content) > _MAX_BYTES:
        raise MemplanError(f"{where} is larger than {_MAX_BYTES >> 20} MiB, so it is no measurement")
    try:
        document = read_json(content)
    except TooManyParts as error:
        raise MemplanError(f"{where} {error}, so it is no measurement") from None
    except (ValueError, RecursionError):
        raise MemplanError(f"{where} is no valid JSON, so it is no measurement; is it cut short?") from None
    return parse(document, where)


def parse(document: Any, where: str) -> Measurement:
    """The same of a JSON value."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MemplanError(f"{where} is no measurement; `memplan verify MODEL` writes one")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise MemplanError(
            f"{where} is a measurement of version {shown(document.get('schema_version'))}, but this memplan "
            f"reads version {SCHEMA_VERSION}"
        )
    try:
        return Measurement.model_validate(document)
    except ValidationError as error:
        place, what = first_complaint(error)
        raise MemplanError(f"{where} is a damaged measurement: {place}: {what}") from None
    except MemplanError as error:  # of its recipe
        raise MemplanError(f"{where} is a damaged measurement: recipe: {error}") from None


def read_all(
    folder: Path, skipped: Callable[[str], None] | None = None
) -> Iterator[tuple[Path, Measurement]]:
    """All measurements of a folder, by name, that is by date. ``skipped`` is told in a sentence of each file
    that is none, half-written or strange; without it MemplanError is raised for the first."""
    for path in sorted(folder.glob("*.json")):
        try:
            measured = read(path)
        except MemplanError as error:
            if skipped is None:
                raise
            skipped(f"{path.name!r} is passed over: {error}")
            continue
        yield path, measured
