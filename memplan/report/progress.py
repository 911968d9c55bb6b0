"""How far something that takes long has come, on standard error while that is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from memplan.report.console import side_terminal
from memplan.streams import visible
from memplan.units import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.tape import Phase


@contextmanager
def points(total: int, *, shown: bool) -> Iterator[Callable[[], None] | None]:
    """A function to call for each point of a table that is done, or None where nobody watches."""
    console = side_terminal()
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.completed} of {task.total} points"), BarColumn(), TimeElapsedColumn())
    # drawn when a point is done, not by a thread: the work is shared by processes that are forked
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def done() -> None:
            bar.advance(task)
            bar.refresh()

        yield done


@contextmanager
def tracing(layers: int | None) -> Iterator[Callable[[Phase, int | None], None] | None]:
    """A function to tell phases and layers to, or None where nobody watches. ``layers`` is how many layers
    the model has, if that is known."""
    console = side_terminal()
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:24}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building the model", total=None)
        seen: tuple[str, int | None] = ("", None)

        def tell(phase: Phase, layer: int | None) -> None:
            nonlocal seen
            here = (phase.value, layer)
            if here == seen or (layer is None and phase.value == seen[0]):
                return
            seen = here
            if layer is None:
                bar.update(task, description=phase.value)
            else:  # backward goes from the last layer to the first, over the bar's second half
                total = None if layers is None else 2 * layers
                done = layer if phase.value == "forward" or layers is None else 2 * layers - layer
                bar.update(task, description=f"{phase.value}, layer {layer}", total=total, completed=done)

        yield tell


class _Left(ProgressColumn):
    """What is left of a guess."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def render(self, task: Task) -> Text:
        """The guess less what has gone by."""
        left = self.seconds - (task.elapsed or 0.0)
        return Text(f"about {duration(left)} left" if left > 0 else "longer than guessed")


@contextmanager
def training(steps: int, seconds: float) -> Iterator[Callable[[str, Any], None] | None]:
    """A function to tell what a training process says, or None where nobody watches. ``seconds``: what it
    may take, as far as that can be guessed."""
    console = side_terminal()
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description:32}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        _Left(seconds),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=steps)

        def tell(kind: str, value: Any) -> None:
            if kind == "state":
                bar.update(task, description=visible(str(value)))
            elif kind == "step":
                bar.update(task, completed=int(value["number"]))

        yield tell


@contextmanager
def campaigning(
    runs: int,
) -> Iterator[tuple[Callable[[str, Any], None], Callable[[str], None], Callable[[], None]]]:
    """Three functions: what a training process says, which run begins, and that it ended."""
    console = side_terminal()
    if not console.is_terminal:
        yield (lambda kind, value: None), (lambda name: None), (lambda: None)
        return
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=runs)
        running = ""

        def tell(kind: str, value: Any) -> None:
            if kind == "state":
                bar.update(task, description=visible(f"{running}: {value}"))

        def begin(name: str) -> None:
            nonlocal running
            running = name
            bar.update(task, description=visible(name))

        yield tell, begin, lambda: bar.advance(task)
