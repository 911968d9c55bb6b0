"""A short run of every fuzzer (``python -m tests.fuzz`` makes the long ones), and what they must see."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("limits are set and memory is read as Linux has it", allow_module_level=True)

from fuzz import harness, run
from fuzz.__main__ import main
from fuzz.command import plain
from fuzz.mutate import smaller
from fuzz.snapshots import Payload

from memplan.errors import MemplanError

SEED = 2
INPUTS = {
    "configs": 250,
    "recipes": 150,
    "arguments": 100,
    "yaml_files": 100,
    "tapes": 100,
    "snapshots": 150,
    "measurements": 60,
}


@pytest.mark.parametrize("name", run.FUZZERS)
def test_no_input_does_what_it_must_not(name: str) -> None:
    found = run.hunt(name, SEED, range(INPUTS[name]), jobs=2, shrinking=3)
    assert not found.faults, run.table([found], SEED)
    assert found.inputs == INPUTS[name]
    # a fuzzer whose inputs are all refused, or all answered, looks at half of memplan
    assert found.inputs * 0.05 < found.refused < found.inputs * 0.95


def test_the_shares_are_of_one_whole() -> None:
    assert sum(module.SHARE for module in run.FUZZERS.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", run.FUZZERS)
def test_an_input_follows_from_its_number(name: str) -> None:
    assert repr(run.value_of(name, 5, 17)) == repr(run.value_of(name, 5, 17))
    assert len({repr(run.value_of(name, 5, number)) for number in range(20)}) > 10


# -- what they see -----------------------------------------------------------------------------------------


def planted(what: str) -> None:
    """In the place of memplan: does what its input says."""
    match what:
        case "answer":
            pass
        case "refuse":
            raise MemplanError("this can't be planned; give another")
        case "oracle":
            raise harness.Fault("categories don't add up")
        case "exception":
            raise KeyError("tape")
        case "exception's name":
            raise MemplanError("it can't be read: UnicodeDecodeError")
        case "long":
            raise MemplanError("x" * 1000)
        case "memory":
            bytearray(harness.BYTES + (harness.BYTES >> 3))
        case "more memory than there is":
            try:
                bytearray(1 << 40)
            except MemoryError:
                raise MemplanError("it is damaged") from None
        case "computes":
            while True:
                pass
        case "waits":
            time.sleep(60)
        case "dies":
            os.kill(os.getpid(), 11)
        case "ends":
            os._exit(0)
        case "runs a payload":
            Payload().__reduce__()[0](harness.PLANTED)
        case "starts something":
            os.system("true")
        case "writes elsewhere":
            Path("../../elsewhere.json").write_text("x")
        case "writes here":
            Path("here.json").write_text("x")


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("oracle", "categories don't add up"),
        ("exception", "KeyError at ?"),
        ("exception's name", "a sentence names Python's own (?)"),
        ("long", "a sentence of more than 500 characters (?)"),
        ("memory", "takes more than 1 GiB"),
        ("more memory than there is", "takes more memory than there is (?)"),
        ("computes", "takes more than 1 s"),
        ("waits", "no answer in 3 s"),
        ("dies", "ends Python: SIGSEGV"),
        ("ends", "ends Python: status 0"),
        ("runs a payload", "a side effect"),
        ("starts something", "a side effect"),
        ("writes elsewhere", "a side effect"),
    ],
)
def test_a_fault_is_seen_and_is_not_the_end(what: str, kind: str) -> None:
    worker = harness.Worker(seconds=1 if what == "computes" else 30)
    try:
        worker.patience = 3 if what == "waits" else 60
        assert worker.ask(planted, what).fault == kind
        worker.patience = 60
        for fine, answered in (("answer", True), ("refuse", False), ("writes here", True)):
            result = worker.ask(planted, fine)
            assert (result.fault, result.answered) == (None, answered)
    finally:
        worker.close()


def test_printed_escapes_are_seen() -> None:
    plain("one\ntwo\n")
    with pytest.raises(harness.Fault, match="control characters in what is printed"):
        plain("\x1b[31mred")


def broken(value: dict[str, Any]) -> None:
    """An oracle that any list with a 7 in it breaks."""
    if 7 in value["list"]:
        raise harness.Fault("a seven")


def test_the_smallest_form_of_a_fault_is_found() -> None:
    whole = {"list": [*range(100)], "more": {"a": "text"}}
    # the key "list" can't go: without it the fault is another
    assert run.smallest(broken, whole, "a seven", 30) == {"list": [7]}


def test_smaller_values_end() -> None:
    random, value = Random(1), run.value_of("recipes", 1, 1)
    steps = 0
    while candidates := list(smaller(value)):
        value = random.choice(candidates)
        steps += 1
        assert steps < 1000


class Faulty:
    """A fuzzer of which every third input is a fault."""

    SHARE = 1.0

    @staticmethod
    def make(random: Random) -> str:
        return random.choice(("answer", "refuse", "exception"))

    check = staticmethod(planted)


def test_the_command_prints_a_table_and_how_to_repeat_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FUZZERS", {"faulty": Faulty})
    monkeypatch.setattr("fuzz.__main__.FUZZERS", {"faulty": Faulty})
    assert main(["--inputs", "30", "--seed", "4", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    head, row, _, fault, repeat, value = out.splitlines()
    assert head.split() == ["inputs", "refused", "answered", "slowest", "largest", "faults"]
    counts = [int(number) for number in row.split()[1:4]]
    assert counts[0] == 30 and min(counts) > 0
    assert fault.startswith(f"faulty: KeyError at ?, {30 - counts[1] - counts[2]} times")
    assert value == "  'exception'"
    number = repeat.split()[-1]
    assert repeat == f"  python -m tests.fuzz --only faulty --seed 4 --number {number}"
    assert main(["--only", "faulty", "--seed", "4", "--number", number]) == 1
    monkeypatch.setattr(Faulty, "make", staticmethod(lambda random: "answer"))
    assert main(["--inputs", "3", "--jobs", "1"]) == 0
