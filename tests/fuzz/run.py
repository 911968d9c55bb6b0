"""Many inputs of a fuzzer, what became of them, and the smallest form of each fault."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from threading import Lock
from types import ModuleType
from typing import Any, TextIO

from . import arguments, configs, measurements, recipes, snapshots, tapes, yaml_files
from .harness import Check, Result, Worker
from .mutate import smaller

FUZZERS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (configs, recipes, arguments, yaml_files, tapes, snapshots, measurements)
}
_one_at_a_time = Lock()
SHRINKING = 60.0  # seconds for the smallest form of one fault


@dataclass
class Fault:
    """One kind of fault: the number of the first input that has it, how many have, and the smallest form."""

    kind: str
    detail: str
    number: int
    value: Any
    times: int = 1


@dataclass
class Found:
    """What became of a fuzzer's inputs."""

    name: str
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, number: int, value: Any, result: Result) -> None:
        """Count one."""
        self.inputs += 1
        self.refused += not result.answered and result.fault is None
        self.slowest, self.largest = max(self.slowest, result.seconds), max(self.largest, result.nbytes)
        if result.fault is None:
            return
        if result.fault in self.faults:
            self.faults[result.fault].times += 1
        else:
            self.faults[result.fault] = Fault(result.fault, result.detail, number, value)


def value_of(name: str, seed: int, number: int) -> Any:
    """The input of that number. One at a time: what starts from plans has them made, on one shadow."""
    with _one_at_a_time:
        return FUZZERS[name].make(Random(f"{seed}/{name}/{number}"))


def hunt(
    name: str,
    seed: int,
    numbers: Sequence[int],
    jobs: int = 1,
    *,
    shrinking: float = SHRINKING,
    tell: TextIO | None = None,
) -> Found:
    """Check a fuzzer's inputs of these numbers, in so many processes."""
    found, check = Found(name), FUZZERS[name].check

    def some(first: int) -> None:
        worker = Worker()
        try:
            for number in numbers[first::jobs]:
                value = value_of(name, seed, number)
                result = worker.ask(check, value)
                found.add(number, value, result)
                if tell is not None and result.fault is not None and found.faults[result.fault].times == 1:
                    tell.write(f"{name} {number}: {result.fault}: {result.detail[:150]!r}\n")
        finally:
            worker.close()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(some, range(jobs)))
    for fault in found.faults.values():
        fault.value = smallest(check, fault.value, fault.kind, shrinking)
    return found


def smallest(check: Check, value: Any, kind: str, seconds: float) -> Any:
    """The smallest value that was found in so many seconds to have the same fault."""
    worker, end = Worker(), time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            for candidate in smaller(value):
                if time.monotonic() > end:
                    return value
                if worker.ask(check, candidate).fault == kind:
                    value = candidate
                    break
            else:
                return value
        return value
    finally:
        worker.close()


def table(found: Sequence[Found], seed: int) -> str:
    """What is printed at the end."""
    lines = [f"{'':13}{'inputs':>8}{'refused':>9}{'answered':>10}{'slowest':>10}{'largest':>10}{'faults':>8}"]
    for one in found:
        faulty = sum(fault.times for fault in one.faults.values())
        lines.append(
            f"{one.name:13}{one.inputs:8}{one.refused:9}{one.inputs - one.refused - faulty:10}"
            f"{one.slowest:8.1f} s{one.largest / (1 << 20):6.0f} MiB{len(one.faults):8}"
        )
    for one in found:
        for fault in one.faults.values():
            lines += ["", f"{one.name}: {fault.kind}, {fault.times} times: {fault.detail[:200]!r}"]
            lines.append(f"  python -m tests.fuzz --only {one.name} --seed {seed} --number {fault.number}")
            lines.append(f"  {shown(fault.value)}")
    return "\n".join(lines) + "\n"


def shown(value: Any, most: int = 400) -> str:
    """A value in Python's words, cut."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
