"""What PyTorch's allocator remembers of a program that is dry-run: the peak and whose lines hold it, and a
step with each of its allocations. Stands alone, as memplan_watch.py does.

Lines are of the program itself where one is on the stack, else of the library nearest to it. Bytes; times in
microseconds, of the clock of the history.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_LARGEST = 12  # lines that are told
_LIBRARIES = tuple(
    os.path.join(path, "") for path in {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
)

When = Callable[[int], tuple[str, str]]  # phase and module at a time
Known = dict[int, tuple[str, str, str]]  # by address: module, name, category


def of_card(torch: Any, card: int) -> list[dict[str, Any]]:
    """The history of a card."""
    traces: list[list[dict[str, Any]]] = torch.cuda.memory._snapshot()["device_traces"]
    return traces[card]


def peak(history: list[dict[str, Any]], began: int, ended: int | None, when: When) -> dict[str, Any] | None:
    """The highest point since training ``began``, or the one where it ran out, at ``ended``: when, at which
    line, and whose bytes are there. None if nothing was allocated."""
    best, at = 0, None
    for event, now, _ in _played(history):
        if ended is not None and event["time_us"] > ended:
            break
        if event["action"] == "alloc" and (ended or (now > best and event["time_us"] >= began)):
            best, at = now, event
    if at is None:
        return None
    held = next(live for event, _, live in _played(history) if event is at)
    groups: dict[tuple[str, ...], list[int]] = {}
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for event in held.values():
        made = {**line(_frames(event)), "phase": when(event["time_us"])[0]}
        key = tuple(map(str, made.values()))
        lines[key] = made
        groups.setdefault(key, []).append(event["size"])
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))
    phase, module = when(at["time_us"])
    return {
        "held_bytes": sum(map(sum, groups.values())),
        "time_us": at["time_us"],
        "phase": phase,
        "module": module,
        "asked_bytes": at["size"],
        **line(_frames(at)),
        "largest": [
            {**lines[key], "bytes": sum(sizes), "count": len(sizes)} for key, sizes in largest[:_LARGEST]
        ],
    }


def step(
    history: list[dict[str, Any]],
    began: int,
    ended: int,
    when: When,
    known: Known,
    gradients: set[int],
) -> dict[str, Any]:
    """The events from ``began`` to ``ended``, as memplan/emulate/taped.py reads them. ``known``: what lies
    there all the time; ``gradients``: where they lie when the optimizer begins."""
    live: dict[int, int] = {}
    before: list[Any] | None = None
    events: list[Any] = []
    for event in history:
        if event["time_us"] > ended:
            break
        if before is None and event["time_us"] >= began:
            before = [[address, size, *known.get(address, ("", "", ""))] for address, size in live.items()]
        if event["action"] not in ("alloc", "free_requested"):
            continue
        address = event["addr"]
        if event["action"] == "alloc":
            live[address] = event["size"]
        else:
            live.pop(address, None)
        if before is not None:
            size = live.get(address, 0)
            events.append([address, size, *when(event["time_us"]), _words(event) if size else ""])
    return {"before": before or [], "events": events, "gradients": sorted(gradients)}


def _words(event: dict[str, Any]) -> str:
    made = line(_frames(event))
    if not made["file"]:
        return "autograd"
    return f"{made['function']} ({os.path.basename(made['file'])}:{made['line']})"


def line(frames: Iterable[tuple[str, int, str]]) -> dict[str, Any]:
    """Of frames, the innermost first: the program's own line, and the library's that is nearest to it."""
    frames = [frame for frame in frames if not frame[0].startswith(os.path.dirname(__file__))]
    own = next((frame for frame in frames if not frame[0].startswith(_LIBRARIES)), None)
    file, number, function = next((frame for frame in frames if not _of_torch(frame[0])), ("", 0, ""))
    return {
        "file": _short(file),
        "line": number,
        "function": function,
        "own": f"{_short(own[0])}:{own[1]}" if own is not None else "",
    }


def address(tensor: Any) -> int:
    """Where a tensor lies: of one that is spread over ranks, this rank's part."""
    part = getattr(tensor, "_local_tensor", tensor)
    return int(part.untyped_storage().data_ptr())


def known(modules: Iterable[Any], optimizers: Iterable[Any]) -> Known:
    """What lies on the card all the time, by address: parameters, what bitsandbytes keeps beside them,
    buffers and the optimizers' states."""
    found: Known = {}

    def note(tensor: Any, module: str, name: str, category: str) -> None:
        if getattr(tensor, "is_cuda", False):
            found.setdefault(address(tensor), (module, name, category))

    for root in modules:
        for full, module in root.named_modules():
            own = "lora_" in full or "modules_to_save" in full
            for name, parameter in module.named_parameters(recurse=False):
                note(parameter, full, name, "adapters" if own else "weights")
                state = getattr(parameter, "quant_state", None)
                while state is not None:
                    for key in ("absmax", "code", "offset"):
                        note(getattr(state, key, None), full, f"quant_state.{key}", "quantization_state")
                    state = getattr(state, "state2", None)
            for name, buffer in module.named_buffers(recurse=False):
                note(buffer, full, name, "weights")
    for optimizer in optimizers:
        for states in optimizer.state.values():
            for key, value in states.items() if isinstance(states, dict) else ():
                note(value, "", f"optimizer.{key}", "optimizer_state")
    return found


def _played(history: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int, dict[int, Any]]]:
    """Each event, the bytes that are there after it, and what holds them, by address."""
    live: dict[int, Any] = {}
    now = 0
    for event in history:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            now += event["size"]
        elif event["action"] == "free_requested":  # from when on it is not counted any more
            gone = live.pop(event["addr"], None)
            now -= gone["size"] if gone else 0
        yield event, now, live


def _frames(event: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(frame["filename"], frame["line"], frame["name"]) for frame in event.get("frames", ())]


def _of_torch(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file or file.startswith("<")


def _short(file: str) -> str:
    for folder in _LIBRARIES:
        if file.startswith(folder):
            return file[len(folder) :]
    near = os.path.relpath(file) if file else file
    return file if near.startswith(os.pardir) else near
