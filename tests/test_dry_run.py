"""``memplan dry-run`` without PyTorch's CUDA build: what it reads, judges, says and refuses. `.ci/run` tries
the rest in an environment that has the build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Outcome

from memplan.asked.gpus import find_gpu
from memplan.emulate import elf
from memplan.emulate.answer import DryRun, Seen, answer, read
from memplan.emulate.launch import Watching, environment, run
from memplan.emulate.program import _check_flags, _program, find, interpreter
from memplan.errors import MemplanError
from memplan.report.dry_run import show_dry_run, where

GIB, MIB = 1 << 30, 1 << 20
CARD = find_gpu("a6000")
CONTEXT = 640 * MIB
LINE = {
    "file": "transformers/models/llama/modeling_llama.py",
    "line": 147,
    "function": "forward",
    "own": "train.py:23",
}
Memplan = Callable[..., Outcome]


COUNTERS = {
    "allocated_bytes": 20 * GIB,
    "reserved_bytes": 30 * GIB,
    "resting_bytes": 10 * GIB,
    "retries": 0,
}


def stretch(kind: str, ended: int = 1, **told: int) -> dict[str, Any]:
    return {**COUNTERS, "kind": kind, "ended": ended, **told}


def seen(steps: list[dict[str, Any]] | None = None, **told: Any) -> Seen:
    """What a process of a program that trains writes, unless told otherwise."""
    steps = [stretch("step", 10 + number) for number in range(3)] if steps is None else steps
    held = {**LINE, "phase": "forward", "bytes": 9 * GIB, "count": 32}
    peak = {
        **LINE,
        "step": 2,
        "phase": "forward",
        "module": "model.layers.3",
        "asked_bytes": GIB,
        "held_bytes": 19 * GIB,
        "largest": [held],
    }
    usual = {
        "used": True,
        "stretches": [stretch("loading"), *steps],
        "ran_out": None,
        "error": None,
        "versions": {"torch": "2.13.0"},
        "rank": 0,
        "world": 1,
        "device": "dry NVIDIA RTX A6000",
        "peak": peak,
        "host": {"tensor_bytes": 0, "pinned_bytes": 0},
    }
    return Seen.model_validate({**usual, **told})


def step(**told: int) -> dict[str, Any]:
    small = {"allocated_bytes": GIB, "reserved_bytes": GIB, "resting_bytes": GIB}
    return stretch("step", **{**small, **told})


RAN_OUT = {
    **LINE, "step": 1, "phase": "backward", "module": "", "asked_bytes": GIB, "free_bytes": MIB,
    "allocated_bytes": 46 * GIB, "reserved_bytes": 46 * GIB,
}  # fmt: skip


def judged(
    *found: Seen, status: int | None = 0, steps: int = 3, wanted: Any = (), ranks: Any = (0,)
) -> DryRun:
    return answer(
        ["python", "train.py"],
        CARD,
        found,
        status,
        context=CONTEXT,
        asked=steps,
        wanted=wanted,
        ranks=ranks,
        version="0",
    )


@pytest.mark.parametrize(
    ("told", "status", "verdict"),
    [
        ({}, 0, "fits"),
        ({"steps": [step(reserved_bytes=CARD.visible_bytes - CONTEXT)] * 3}, 0, "tight"),
        ({"steps": [step(retries=2)] * 3}, 0, "tight"),
        ({"steps": [], "ran_out": RAN_OUT, "error": "OutOfMemoryError"}, 1, "does not fit"),
        # it ran out, gave something up and went on
        ({"ran_out": RAN_OUT}, 0, "fits"),
        # or ended, or waited, without another step, whatever it says of itself
        ({"steps": [], "ran_out": RAN_OUT}, 0, "does not fit"),
        ({"steps": [step()], "ran_out": {**RAN_OUT, "step": 2}}, None, "does not fit"),
    ],
)
def test_verdicts(told: dict[str, Any], status: int, verdict: str) -> None:
    found = judged(seen(**told), status=status)
    assert found.verdict == verdict
    assert (found.needed_bytes is None) == (verdict == "does not fit")
    assert (found.ran_out is not None) == (verdict == "does not fit")


def test_what_is_needed_is_reserved_at_most_and_the_process() -> None:
    assert judged(seen()).needed_bytes == 30 * GIB + CONTEXT
    for kind in ("loading", "evaluation", "saving", "afterwards"):
        more = [stretch(kind, reserved_bytes=35 * GIB), step()]
        assert judged(seen(stretches=more), steps=1).needed_bytes == 35 * GIB + CONTEXT


def test_the_process_that_takes_the_most_decides() -> None:
    launcher = seen(stretches=[], peak=None)
    small, large = seen(steps=[step()] * 3), seen(steps=[step(reserved_bytes=40 * GIB)] * 3)
    assert not any("processes" in note for note in judged(launcher, small).notes)
    found = judged(launcher, small, large)
    assert found.steps[0].reserved_bytes == 40 * GIB
    assert "2 processes used the card" in found.notes[-1]


@pytest.mark.parametrize(
    ("found", "status", "sentence"),
    [
        ([], 0, "never used the card"),
        ([], None, "did not use the card in the time it was given"),
        ([seen(used=False, steps=[])], 3, r"failed by itself \(exit status 3\) before it used the card"),
        (
            [seen(steps=[], error="ValueError")],
            1,
            r"failed by itself \(exit status 1, ValueError\) before its first",
        ),
        ([seen(steps=[step()], error="ValueError")], 1, "after one optimizer step"),
        ([seen(steps=[], error="RuntimeError", beyond="CUDA graphs")], 1, "uses CUDA graphs, which can't be"),
        # a launcher's own exception says nothing, and data sets are not served
        (
            [
                seen(used=False, steps=[], error="CalledProcessError"),
                seen(used=False, steps=[], error="ConnectionError"),
            ],
            1,
            r"\(exit status 1, ConnectionError\) before it used .*data sets are not served as models are",
        ),
        ([seen(steps=[])], 0, "took no optimizer step before it ended"),
        ([seen(steps=[])], None, "in the time it was given: give it more with --timeout"),
    ],
)
def test_programs_that_say_nothing_of_training(found: list[Seen], status: int | None, sentence: str) -> None:
    with pytest.raises(MemplanError, match=sentence):
        judged(*found, status=status)


def test_a_program_that_ends_early_is_judged_by_what_it_did() -> None:
    notes = judged(seen(steps=[step()])).notes
    assert notes[0] == "the program ended after one optimizer step, of the 3 that were asked for"
    assert notes[1].startswith("it is judged by one optimizer step and what the program did in it")


def test_of_one_that_ran_out_larger_cards_are_told() -> None:
    found = judged(seen(steps=[], ran_out=RAN_OUT, error="OutOfMemoryError"), status=1)
    assert found.notes[0].endswith("the NVIDIA H100 PCIe or another up to the NVIDIA B200")


@pytest.mark.parametrize(
    ("found", "ranks", "sentence"),
    [
        ([seen(world=8), seen(world=8, rank=7, steps=[])], (0, 7), "rank 7 took no optimizer step"),
        ([seen(world=8), seen(world=8, rank=7)], (0, 3, 5, 7), "ranks 3, 5 took no optimizer step"),
        ([seen(world=2)], (), "rank 1 took no optimizer step"),
        ([seen(world=8)], (0, 8), "--ranks names 8, and the program has 8 ranks, from 0 to 7"),
    ],
)
def test_a_rank_that_was_asked_for_and_took_no_step(
    found: list[Seen], ranks: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(MemplanError, match=sentence):
        judged(*found, ranks=ranks)
    there = tuple({one.rank for one in found if one.of("step")})
    assert judged(*found, ranks=there).verdict == "fits"


def test_a_peak_beside_the_steps_is_told_after_one() -> None:
    told = seen().peak
    assert told is not None
    after = told.model_copy(update={"phase": "evaluation", "step": 3, "module": "base_model.model.lm_head"})
    assert where(after) == "evaluation after step 3 of lm_head"


def test_cudnn_s_attention_is_told_of() -> None:
    found = answer([], find_gpu("h100"), [seen()], 0, context=CONTEXT, asked=3, version="0")
    assert "cuDNN's attention" in found.notes[-1]


def test_the_answer_on_the_terminal(golden: Callable[[str, str], None]) -> None:
    from test_report import printed

    fits = printed(lambda console: show_dry_run(judged(seen()), console))
    ended = judged(seen(steps=[], ran_out=RAN_OUT, error="OutOfMemoryError"), status=1)
    golden("dry_run.txt", fits + "\n" + printed(lambda console: show_dry_run(ended, console)))


def test_several_cards_are_told_of() -> None:
    from test_report import printed

    found = answer(["torchrun"], CARD, [seen(world=8)], 0, context=CONTEXT, count=8, asked=3, version="0")
    text = printed(lambda console: show_dry_run(found, console))
    assert text.startswith("fits on the 8 × RTX A6000 (emulated): 30.62 of 47.40 GiB needed on each\n")
    assert "rank 0 of 8 ran and stands for all" in text
    assert "by rank" not in text
    both = [seen(world=8), seen(world=8, rank=7, steps=[step()])]
    found = answer(["torchrun"], CARD, both, 0, context=CONTEXT, count=8, asked=1, version="0")
    text = printed(lambda console: show_dry_run(found, console))
    assert "by rank, in GiB: 0: 20.00 and 30.00; 7: 1.00 and 1.00." in text.replace("\n", " ")
    assert "ranks 0, 7 of 8 ran and stand for all" in text.replace("\n", " ")


def test_growth_is_told() -> None:
    from test_report import printed

    leaking = seen(steps=[step(resting_bytes=number * GIB) for number in (1, 2, 3)])
    assert "grows by 1.00 GiB a step" in printed(lambda console: show_dry_run(judged(leaking), console))
    assert "grows" not in printed(lambda console: show_dry_run(judged(seen()), console))


def test_evaluation_and_saving_have_rows_and_are_missed() -> None:
    from test_report import printed

    more = [step(), stretch("evaluation"), stretch("saving", allocated_bytes=GIB), stretch("evaluation")]
    found = judged(seen(stretches=more), steps=1, wanted=("evaluation", "saving"))
    assert found.evaluation is not None and found.evaluation.allocated_bytes == 20 * GIB
    assert "may take more (--steps)" in found.notes[-1]
    text = printed(lambda console: show_dry_run(found, console))
    assert "  evaluation      20.00     30.00    10.00\n  saving           1.00" in text
    missed = judged(seen(steps=[step()]), steps=1, wanted=("evaluation",))
    assert missed.notes[0] == "no evaluation came, which was asked for"
    assert "an evaluation or a checkpoint may take more (--steps, --eval, --save)" in missed.notes[1]


def test_what_the_host_holds_is_told_where_it_is_much() -> None:
    from test_report import printed

    offloads = seen(host={"tensor_bytes": 30 * GIB, "pinned_bytes": 16 * GIB})
    assert "The host holds 30.00 GiB of tensors" in printed(lambda it: show_dry_run(judged(offloads), it))
    assert "The host" not in printed(lambda it: show_dry_run(judged(seen()), it))


# -- the last step as a tape -------------------------------------------------------------------------------

STEP: dict[str, Any] = {
    "before": [[1, 1024, "base_model.model.model.layers.0.mlp", "weight", "weights"], [2, 512, "", "", ""]],
    "events": [
        [3, 2048, "forward", "base_model.model.model.layers.0.mlp", "forward (mlp.py:7)"],
        [4, 512, "forward", "model.layers.0.mlp", "forward (mlp.py:8)"],
        [4, 0, "forward", "model.layers.0.mlp", ""],
        [5, 4096, "forward past the head", "lm_head", "forward (head.py:1)"],
        [5, 0, "backward", "", ""],
        [6, 1024, "recomputation", "model.layers.0.mlp", "forward (mlp.py:7)"],
        [7, 1024, "backward", "model.layers.0.mlp", "autograd"],
        [6, 0, "backward", "model.layers.0.mlp", ""],
        [3, 0, "backward", "model.layers.0.mlp", ""],
        [8, 512, "update", "", "step (adamw.py:3)"],
        [8, 0, "update", "", ""],
    ],
    "gradients": [7],
}


def test_a_step_becomes_a_tape(tmp_path: Path) -> None:
    from memplan.emulate.taped import read_step
    from memplan.tape import Category, Phase, replay

    assert read_step(tmp_path) is None
    (tmp_path / "1.json.step").write_text(json.dumps({}))
    assert read_step(tmp_path) is None
    (tmp_path / "2.json.step").write_text(json.dumps(STEP))
    tape = read_step(tmp_path)
    assert tape is not None and tape.provenance == "emulated"
    assert [category.value for category in tape.categories] == [
        "weights", "temporaries", "activations", "temporaries", "logits_and_loss", "activations", "gradients",
        "temporaries",
    ]  # fmt: skip
    assert tape.modules[0] == tape.modules[2] == "model.layers.0.mlp"
    peak = replay(tape)
    assert (peak.allocated_bytes, peak.phase, peak.operation) == (7680, Phase.FORWARD, "forward (head.py:1)")
    assert peak.by_category[Category.WEIGHTS] == 1024
    assert [segment.layer for segment in tape.segments] == [None, 0, None, None, 0, None]


def test_a_step_that_nobody_wrote_so_is_refused(tmp_path: Path) -> None:
    from memplan.emulate.taped import read_step

    (tmp_path / "1.json.step").write_text(json.dumps({**STEP, "events": [[1, -5, "forward", "", ""]]}))
    with pytest.raises(MemplanError, match="of its last step can't be read"):
        read_step(tmp_path)


def test_the_page_of_a_dry_run(tmp_path: Path) -> None:
    from memplan.emulate.taped import read_step
    from memplan.report.dry_run_page import page

    (tmp_path / "1.json.step").write_text(json.dumps(STEP))
    tape = read_step(tmp_path)
    assert tape is not None
    found = answer(["python", "<x>.py"], CARD, [seen()], 0, context=CONTEXT, asked=3, version="0")
    text = page(found, tape)
    assert "fits on the RTX A6000 (emulated): 30.62 of 47.40 GiB needed" in text
    assert "python &lt;x&gt;.py" in text and "<x>" not in text
    assert '"phases":[["forward",0,4]' in text


def test_a_file_that_nobody_wrote_so_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(seen().model_dump_json())
    assert read(tmp_path) == [seen()]
    (tmp_path / "2.json").write_text('{"used": true}')
    with pytest.raises(MemplanError, match="can't be read"):
        read(tmp_path)


# -- programs --------------------------------------------------------------------------------------------


def script(folder: Path, first: str) -> str:
    path = folder / "train"
    path.write_text(f"{first}\n")
    path.chmod(0o755)
    return str(path)


def test_the_python_of_a_program(tmp_path: Path) -> None:
    assert interpreter(sys.executable) == Path(sys.executable)
    assert interpreter(script(tmp_path, f"#!{sys.executable} -s")) == Path(sys.executable)
    assert interpreter(script(tmp_path, "#!/usr/bin/env python3")).name == "python3"


def test_the_program_behind_env() -> None:
    from memplan.emulate.program import _program

    assert _program(["env", "-u", "X=1", "Y=2", "python", "a=b"]) == "python"
    assert _program(["torchrun", "x.py"]) == "torchrun"
    with pytest.raises(MemplanError, match="no program after env"):
        _program(["env", "X=1"])


@pytest.mark.parametrize("first", [f"#!{sys.executable} -E", "#!/usr/bin/env -S python3 -I"])
def test_a_python_that_can_t_be_watched(tmp_path: Path, first: str) -> None:
    with pytest.raises(MemplanError, match=r"can't be watched with -[EI]"):
        find([script(tmp_path, first)])
    for flags in (["-sE"], ["-W", "ignore", "-sE"], ["-Xdev", "-sE"]):
        with pytest.raises(MemplanError, match="can't be watched with -sE"):
            find([sys.executable, *flags, "train.py"])


@pytest.mark.parametrize("flags", [["-Werror::ImportWarning"], ["-X", "importtime"], ["-um", "EIS"], ["-cE"]])
def test_what_is_said_to_a_flag_is_none(flags: list[str]) -> None:
    _check_flags([*flags, "train.py", "-E"])


def test_the_options_of_env() -> None:
    assert _program(["env", "-u", "NAME", "--chdir", "/", "A=1", "python", "x.py"]) == "python"
    for flag in ("-i", "-", "--ignore-environment"):
        with pytest.raises(MemplanError, match="takes away what the card is made of"):
            _program(["env", flag, "python"])


def test_what_is_env_s_own_is_no_flag_of_python_s(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(MemplanError, match="is a CPU build"):
        find([script(tmp_path, f"#!/usr/bin/env -S {sys.executable} -u")])


@pytest.mark.parametrize(
    ("first", "sentence"),
    [("#!/bin/sh", "can't be told from its first line"), ("\x7fELF", "is no Python program")],
)
def test_what_is_no_python_program(tmp_path: Path, first: str, sentence: str) -> None:
    with pytest.raises(MemplanError, match=sentence):
        interpreter(script(tmp_path, first))


def test_a_cpu_build_is_refused_with_what_to_do(memplan: Memplan) -> None:
    pytest.importorskip("torch")
    outcome = memplan("dry-run", "--gpu", "a6000", "--", sys.executable, "train.py")
    assert outcome.status == 2
    assert "is a CPU build: install PyTorch's CUDA build in its environment" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "a6000", "--", "nonesuch"], "there is no program 'nonesuch'"),
        (["--gpu", "mi300x", "--", "python", "x.py"], "can't be emulated yet"),
        (["--gpu", "a6000"], "COMMAND"),
        (["--gpu", "0xa6000", "--", "python", "x.py"], "--gpu takes from 1 to 64 cards, not 0"),
        (["--gpu", "1000xa6000", "--", "python", "x.py"], "--gpu takes from 1 to 64 cards, not 1000"),
        (["--gpu", "24GB", "--", "python", "x.py"], "a dry run is on a card, which a size is not"),
        (["--gpu", "4090", "--html", "/tmp", "--", "python", "x.py"], "is a folder: name a file"),
        (["--gpu", "a6000", "--gpu", "h100", "--", "python"], "one kind of card: give one --gpu"),
        (["--gpu", "a6000", "--no-watch", "--json", "--", "python"], "with --no-watch nothing is watched"),
        (["--gpu", "a6000", "--ranks", "0-7", "--", "python"], "takes numbers of ranks, such as 0,7, or all"),
        (["--gpu", "a6000", "--steps", "0", "--", "python"], "--steps takes a whole number above 0"),
    ],
)
def test_bad_questions(memplan: Memplan, arguments: list[str], sentence: str) -> None:
    outcome = memplan("dry-run", *arguments)
    assert outcome.status == 2
    assert sentence in outcome.err


def test_options_after_the_program_are_its_own(memplan: Memplan) -> None:
    outcome = memplan("dry-run", "--gpu", "a6000", "--", "nonesuch", "--gpu", "h100", "--json")
    assert "no program 'nonesuch'" in outcome.err


def test_a_program_and_what_it_started_are_gone(tmp_path: Path) -> None:
    """One that hangs, with children that would, too: in a session of its own, as launchers start theirs, and
    without its environment."""
    code = (
        "import pathlib, subprocess, sys, time; "
        "hangs = [sys.executable, '-c', 'import time; time.sleep(60)']; "
        "one, other = subprocess.Popen(hangs, start_new_session=True), subprocess.Popen(hangs, env={}); "
        f"pathlib.Path({str(tmp_path / 'children')!r}).write_text(f'{{one.pid}} {{other.pid}}'); "
        "time.sleep(60)"
    )
    assert run([sys.executable, "-c", code], {}, timeout=3) is None
    for number in (tmp_path / "children").read_text().split():
        assert _gone(Path("/proc", number, "stat"))


def _gone(process: Path) -> bool:
    """Whether it ends: one that was killed may have to be scheduled once more. Z: nobody has buried it."""
    for _ in range(50):
        try:
            if process.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_what_a_program_prints_is_no_part_of_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([sys.executable, "-c", "print('loss 0.0'); raise SystemExit(3)"], {}) == 3
    out, err = capfd.readouterr()
    assert (out, err) == ("", "loss 0.0\n")


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from memplan.emulate import build, launch

    monkeypatch.setattr(launch.program, "find", lambda command: command)
    monkeypatch.setattr(build, "libraries", lambda program: Path("/libraries"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    found = environment(CARD, ["python"], taken=5, watching=Watching(tmp_path, 3))
    assert found["LD_LIBRARY_PATH"] == "/libraries:/mine"
    assert found["MEMPLAN_CARD"].startswith(f"1:{CARD.visible_bytes}:5:8:6:84:")
    told = json.loads(found["MEMPLAN_WATCH"])
    assert (told["folder"], told["steps"], told["wanted"], told["routing"]) == (str(tmp_path), 3, [], "even")
    assert "MEMPLAN_WATCH" not in environment(CARD, ["python"])


# -- shared objects --------------------------------------------------------------------------------------


def test_what_a_shared_object_asks() -> None:
    import _ctypes

    asked = elf.asked(Path(_ctypes.__file__))
    assert "libc.so.6" in asked.needed
    assert any(version.startswith("GLIBC_") for version in asked.versions.values())
    assert any("PyErr_SetString" in symbols for symbols in asked.symbols.values())


def test_a_file_that_is_no_shared_object(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"MZ" * 100)
    with pytest.raises(ValueError, match="no 64-bit shared object"):
        elf.asked(tmp_path / "x.so")


# -- ranks that are not there ----------------------------------------------------------------------------


def test_a_rank_alone_waits_for_nobody(tmp_path: Path) -> None:
    """One of a world of eight, on the host; benchmarks/dry_gpu/ranks.py tries the card, too."""
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    root = Path(__file__).parent.parent
    hook = root / "memplan" / "emulate" / "hook"
    ranks = root / "benchmarks" / "dry_gpu" / "ranks.py"
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(hook)!r}); import torch, memplan_ranks; "
        f"memplan_ranks.prepare(torch); sys.argv = ['ranks.py', '--cpu']; runpy.run_path({str(ranks)!r})"
    )
    world = {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    world["MEMPLAN_WATCH"] = json.dumps({"folder": str(tmp_path), "ranks": [0]})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **world},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((1, 8), None),
        ((1, 9), "9 processes are asked for"),
        ((2, 8), "one node of 16 processes, on 16 cards"),
    ],
)
def test_a_launcher_gets_one_machine_and_no_more_cards_than_there_are(
    asked: tuple[int, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "memplan" / "emulate" / "hook")
    import importlib

    launched: list[object] = []
    api = SimpleNamespace(launch_agent=lambda config: launched.append(config))
    torch = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 8))
    importlib.import_module("memplan_ranks")._on_one_machine(torch, api)
    config = SimpleNamespace(max_nodes=asked[0], nproc_per_node=asked[1])
    if said is None:
        api.launch_agent(config)
        assert launched == [config]
        return
    with pytest.raises(SystemExit, match=said):
        api.launch_agent(config)
    assert not launched


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what is resident")
def test_zeros_that_nobody_wrote_are_converted_into_such(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "memplan" / "emulate" / "hook")
    import importlib

    converted = importlib.import_module("memplan_zeros").converted

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    zeros = torch.zeros(1 << 12, 1 << 14, dtype=torch.bfloat16)
    before = resident()
    made = converted(torch, torch.Tensor.to, (zeros, torch.float32), {})
    again = converted(torch, torch.Tensor.clone, (made,), {})
    assert resident() - before < made.nbytes // 4
    assert (made.shape, made.dtype, made.nbytes) == (zeros.shape, torch.float32, 256 << 20)
    assert again.data_ptr() != made.data_ptr()
    assert converted(torch, torch.Tensor.float, (made,), {}) is None  # which is the same tensor
    assert converted(torch, torch.Tensor.to, (made, "meta"), {}) is None
    assert converted(torch, torch.Tensor.float, (zeros.t(),), {}) is None
    assert converted(torch, torch.Tensor.float, (torch.nn.Parameter(zeros),), {}) is None  # a history
    zeros[-1, -1] = 1
    assert converted(torch, torch.Tensor.float, (zeros,), {}) is None


def test_a_step_of_deepspeed_s_engine_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it steps PyTorch's optimizer, and while it is made."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "memplan" / "emulate" / "hook")
    import importlib

    told = {"folder": "unused", "steps": 3, "wanted": [], "snapshot": False, "tape": False}
    watch = importlib.import_module("memplan_watch").Watch(told)
    counted: list[object] = []
    watch.stepped = counted.append

    class Engine:
        def __init__(self) -> None:
            self.basic_optimizer = "adam"
            self.part()

        def part(self) -> None:
            watch._updating(self.basic_optimizer)
            watch._updated(self.basic_optimizer)

        def _take_model_step(self, lr_kwargs: object) -> None:
            self.part()
            self.part()

    module = SimpleNamespace(DeepSpeedEngine=Engine)
    importlib.import_module("memplan_deepspeed").prepare(watch, module)
    engine = module.DeepSpeedEngine()
    assert counted == []
    engine._take_model_step(None)
    engine._take_model_step(None)
    assert counted == ["adam", "adam"]
    engine.part()
    assert len(counted) == 3
