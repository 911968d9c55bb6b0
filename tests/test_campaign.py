"""Campaigns: the files in benchmarks/, order, budget and resuming; the runs themselves are played."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from example_measurements import HOST, example

from memplan.errors import MemplanError
from memplan.verify import campaign, runner
from memplan.verify.campaign import expand, fingerprint, load, slowness
from memplan.verify.job import Job, gets_through
from memplan.verify.measurement import Measurement, read_all
from memplan.verify.measurement import Outcome as Ending

pytest.importorskip("yaml")
for library in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
    pytest.importorskip(library)

Memplan = Callable[..., Outcome]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODELS = {
    "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-7b", "llama-3.1-8b", "qwen3-8b",
    "gemma-2-9b", "phi-3-mini", "llama-3.3-70b",
}  # fmt: skip


def test_the_campaign_is_what_was_promised() -> None:
    planned = expand(load(BENCHMARKS / "campaign.yaml"))
    assert len(planned) >= 50
    assert len({run.key for run in planned}) == len(planned)
    assert {entry.model for entry in load(BENCHMARKS / "campaign.yaml").runs} == MODELS
    first, fits, fails = planned[:3]
    assert all("70b" in run.name for run in (first, fits, fails))
    assert (first.job.recipe.mode.value, first.job.recipe.r, first.job.recipe.seq_len) == ("qlora", 8, 2048)
    assert first.job.run.cap_bytes is None
    room = fits.job.run.cap_bytes
    assert room == fails.job.run.cap_bytes
    assert room is not None
    assert fits.job.predicted_bytes < room < fails.job.predicted_bytes
    frontiers = [run for run in planned if run.name.startswith("frontier")]
    assert len(frontiers) == 8
    assert {run.job.run.loop for run in planned} == {"memplan", "trainer"}
    assert planned[-8:] == frontiers
    for run in frontiers:
        assert run.job.run.cap_bytes is not None
        inside = gets_through(run.job.model, run.job.recipe, run.job.run.cap_bytes)
        assert inside == ("-fits-" in run.name)
        assert run.job.anyway
    # all but what is meant to run out of memory fit an 80 GB card
    assert max(run.job.predicted_bytes for run in planned) < 76 << 30
    for values in ({"full", "lora", "qlora"}, {"adamw_torch", "adafactor", "sgd", "paged_adamw_8bit"}):
        found = {run.job.recipe.mode.value for run in planned} | {run.job.recipe.optimizer for run in planned}
        assert values <= found


def test_the_smoke_campaign_is_for_a_cpu() -> None:
    planned = expand(load(BENCHMARKS / "campaign_smoke.yaml"))
    assert all(run.job.device == "cpu" and run.job.model.layers == 1 for run in planned)


LAUGHS = "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)) + "\nruns: *a12"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("runs: [", "is no valid YAML"),
        ("runs: []", "runs: "),
        ("[" * 5000, "nested too deeply"),
        ("runs: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("runs: &a [*a]", "an alias stands inside of what it names"),
        ("runs: [&x {name: a, priority: 3}, {<<: *x}]", "runs.0.model"),  # an alias is no fault
        ("a0: &a0 [l, o, l]\n" + LAUGHS, "its aliases unfold to more than 100,000 parts"),
        ("a0: &a0 {a: 1}\n" + LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "unfold to more than"),
        (f"runs: [{{name: a, model: llama-3.2-1b, seed: 0x{'f' * 5000}}}]", "a number that is too long"),
        (f"about: {'a' * (300 << 10)}", "larger than 256 KiB"),
        ("[1]", "is no campaign"),
        ("runs: [{name: a, model: llama-3.2-1b, speed: 3}]", "runs.0.speed"),
        ("runs: [{name: a, model: x}, {name: a, model: x}]", "two runs of the name 'a'"),
        ("runs: [{name: a, model: x, seconds: .inf}]", "runs.0.seconds: .*finite"),
        ("runs: [{name: a, model: x, seconds: .nan}]", "runs.0.seconds: "),
        ("runs: [{name: a, model: x, seconds: 0}]", "runs.0.seconds: .*greater than 0"),
        ("runs: [{name: a, model: x, learning_rate: .nan}]", "runs.0.learning_rate: "),
        ("runs: [{name: a, model: x, seed: -1}]", "runs.0.seed: "),
        ("runs: [{name: a, model: x, steps: 99999999999999999999}]", "runs.0.steps: "),
        ("defaults: {learning_rate: -.inf}\nruns: [{name: a, model: x}]", "defaults.learning_rate: "),
        ("defaults: {learning_rate: 0}\nruns: [{name: a, model: x}]", "defaults.learning_rate: "),
        ("runs: [{name: a, model: lama-3.2-1b}]", "run 'a': .*did you mean"),
        ("runs: [{name: a, model: llama-3.2-1b, recipe: {rank: 3}}]", "run 'a': rank"),
        ("runs: [{name: a, model: llama-3.2-1b, frontier: batch_size}]", "a frontier needs a cap"),
        (
            "runs: [{name: a, model: llama-3.2-1b, frontier: batch_size, cap: 1GiB}]",
            "not even batch_size 1",
        ),
    ],
)
def test_bad_plans(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MemplanError, match=complaint) as caught:
        expand(load(path))
    assert "\n" not in str(caught.value)
    assert not re.search(r"https?:|pydantic|Error", str(caught.value))
    with pytest.raises(MemplanError, match="can't be read"):
        load(tmp_path / "none.yaml")


def test_estimates_are_stretched_by_the_worst_seen() -> None:
    assert slowness([]) == 1.0
    assert slowness([(10, 5), (10, 25), (100, 120)]) == 2.5


# -- running -----------------------------------------------------------------------------------------------

PLAN = """\
defaults: {device: cpu}
runs:
  - {name: late, model: qwen2.5-0.5b, layers: 1, priority: 9, seconds: 10, recipe: {seq_len: 8}}
  - {name: soon, model: qwen2.5-0.5b, layers: 1, priority: 1, seconds: 10, recipe: {seq_len: 16}}
  - {name: long, model: qwen2.5-0.5b, layers: 1, priority: 2, seconds: 1000, recipe: {seq_len: 32}}
"""


class Player:
    """In the place of a training: remembers what was run, and measures what the plan says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.limits: list[float | None] = []
        self.raising: BaseException | None = None
        monkeypatch.setattr(runner, "run_job", self)

    def __call__(self, job: Job, *, tell: Any = None, seconds: float | None = None) -> Measurement:
        assert job.run.campaign is not None
        self.ran.append(job.run.campaign)
        self.limits.append(seconds)
        if self.raising is not None and len(self.ran) > 1:
            raise self.raising
        return example(
            device=HOST,
            counted="CPU storages",
            model=job.model,
            recipe=job.recipe,
            run=job.run.model_copy(update={"settings": {"A": "b"}}),
            tape=None,
            tape_step=None,
            date=f"2026-11-25T12:00:{len(self.ran):02}+00:00",
        )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return path


def test_the_most_informative_first_and_what_does_not_fit_the_budget_is_left(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    outcome = memplan("campaign", plan, "--out", tmp_path / "m", "--budget", "100")
    assert player.ran == ["soon", "late"]
    assert all(limit is not None and limit <= 92 for limit in player.limits)
    assert outcome.status == 1
    assert "3 runs: 2 trained, 1 left" in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert len(list(read_all(tmp_path / "m"))) == 2


def test_resume_runs_only_what_is_left(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    asked = ("campaign", plan, "--out", tmp_path / "m", "--resume")
    memplan(*asked, "--budget", "100")
    player.ran.clear()
    outcome = memplan(*asked)
    assert player.ran == ["long"]
    assert outcome.status == 0
    player.ran.clear()
    assert memplan(*asked).status == 0
    assert player.ran == []


def test_what_failed_is_run_again(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    play = player.__call__

    def failing(job: Job, **options: Any) -> Measurement:
        outcome = Ending(kind="failed", why="RuntimeError: x")
        return play(job, **options).model_copy(update={"outcome": outcome, "steps": (), "evidence": None})

    monkeypatch.setattr(runner, "run_job", failing)
    asked = ("campaign", plan, "--out", tmp_path / "m", "--resume", "--only", "soon")
    assert memplan(*asked).status == 1
    monkeypatch.setattr(runner, "run_job", player)
    assert memplan(*asked).status == 0
    assert player.ran == ["soon", "soon"]
    # a later failure does not take the place of what was measured
    assert memplan(*asked).status == 0
    assert player.ran == ["soon", "soon"]


def test_reading_what_is_done_takes_of_the_budget(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slowly(folder: Path, skipped: Any = None) -> dict[str, Measurement]:
        clock[0] += 80.0
        return {}

    monkeypatch.setattr(campaign, "done", slowly)
    memplan("campaign", plan, "--out", tmp_path / "m", "--resume", "--budget", "100")
    assert player.limits == [12.0, 12.0]


def test_an_interrupt_keeps_what_is_done(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    player.raising = KeyboardInterrupt()
    outcome = memplan("campaign", plan, "--out", tmp_path / "m")
    assert outcome.status == 130
    assert [m.run.campaign for _, m in read_all(tmp_path / "m")] == ["soon"]
    player.raising = None
    player.ran.clear()
    memplan("campaign", plan, "--out", tmp_path / "m", "--resume")
    assert player.ran == ["long", "late"]


def test_a_run_that_dies_does_not_end_the_campaign(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    player.raising = runner.RunDied("the training process was killed by SIGKILL")
    outcome = memplan("campaign", plan, "--out", tmp_path / "m")
    assert player.ran == ["soon", "long", "late"]
    assert outcome.status == 1
    assert "killed by SIGKILL" in outcome.err
    assert len(list(read_all(tmp_path / "m"))) == 1


def test_a_slow_machine_is_reckoned_with(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first run takes ten times what was estimated: the next one's 10 s become 100 s
    player = Player(monkeypatch)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    play = player.__call__

    def slowly(job: Job, **options: Any) -> Measurement:
        clock[0] += 100.0
        return play(job, **options)

    monkeypatch.setattr(runner, "run_job", slowly)
    memplan("campaign", plan, "--out", tmp_path / "m", "--budget", "150")
    assert player.ran == ["soon"]


def test_a_dry_run_starts_nothing(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    outcome = memplan("campaign", plan, "--out", tmp_path / "m", "--dry-run", "--only", "o")
    assert player.ran == []
    assert outcome.status == 0
    assert "soon" in outcome.out
    assert "late" not in outcome.out
    assert not (tmp_path / "m").exists()


def test_a_run_without_a_budget_has_a_limit(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    memplan("campaign", plan, "--out", tmp_path / "m")
    assert player.limits == [120.0, 5000.0, 120.0]  # five times the estimate, at least two minutes
    player.limits.clear()
    memplan("campaign", plan, "--out", tmp_path / "n", "--timeout", "7", "--budget", "2000")
    assert player.limits == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("resumed", [(), ("--dry-run", "--resume")])
def test_nothing_is_written_that_was_not_told_where(
    plan: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch, resumed: tuple[str, ...]
) -> None:
    player = Player(monkeypatch)
    monkeypatch.chdir(plan.parent)
    before = sorted(plan.parent.iterdir())
    outcome = memplan("campaign", plan, *resumed)
    assert (outcome.status, outcome.out, player.ran) == (2, "", [])
    assert "say with --out FOLDER" in outcome.err
    assert sorted(plan.parent.iterdir()) == before


@pytest.mark.parametrize("option", ["--budget", "--timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-3", "soon"])
def test_seconds_are_a_number_above_0(plan: Path, memplan: Memplan, option: str, value: str) -> None:
    outcome = memplan("campaign", plan, f"{option}={value}")
    assert (outcome.status, outcome.out) == (2, "")
    assert "must be a number above 0" in outcome.err


def test_a_full_disk_loses_no_run_and_ends_no_campaign(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.verify import measurement

    player = Player(monkeypatch)
    place = measurement._place

    def full(temporary: Path, path: Path) -> None:
        if path.parent.name == "m":
            raise OSError(28, "No space left on device")
        place(temporary, path)

    monkeypatch.setattr(measurement, "_place", full)
    monkeypatch.setattr(measurement.tempfile, "tempdir", str(tmp_path))
    outcome = memplan("campaign", plan, "--out", tmp_path / "m")
    assert player.ran == ["soon", "long", "late"]
    assert outcome.status == 1
    assert "3 runs: 3 trained" in outcome.out
    assert outcome.err.count("No space left on device; it is kept in") == 3
    kept = [m.run.campaign for path in tmp_path.glob("memplan-kept-*") for _, m in read_all(path)]
    assert sorted(str(name) for name in kept) == ["late", "long", "soon"]
    assert not (tmp_path / "m").exists()


def test_what_can_be_kept_nowhere_is_printed(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.verify import measurement

    Player(monkeypatch)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measurement, "_place", full)
    monkeypatch.setattr(measurement.tempfile, "tempdir", str(tmp_path))
    outcome = memplan("campaign", plan, "--out", tmp_path / "m", "--only", "soon")
    assert outcome.status == 1
    assert "1 runs: 1 trained" in outcome.out
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("memplan: {")]
    assert json.loads(line.removeprefix("memplan: "))["run"]["campaign"] == "soon"
    assert not list(tmp_path.glob("memplan-kept-*"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"format": "memplan measurement"}', b"\xff", b"[" * 9000]
)
def test_a_stray_file_is_passed_over_and_left_alone(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    player = Player(monkeypatch)
    asked = ("campaign", plan, "--out", tmp_path / "m", "--resume", "--only", "soon")
    memplan(*asked)
    stray = tmp_path / "m" / "stray.json"
    stray.write_bytes(content)
    outcome = memplan(*asked)
    assert outcome.status == 0
    assert player.ran == ["soon"]
    assert outcome.err.count("'stray.json' is passed over: ") == 1
    assert outcome.err.count("\n") == 1
    told = memplan("report", tmp_path / "m")
    assert told.status == 0
    assert "qwen2.5-0.5b" in told.out
    assert told.err == outcome.err
    assert stray.read_bytes() == content


HOLD = """
import sys, time
from pathlib import Path
from memplan.verify.locks import alone
with alone(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_a_folder_takes_one_campaign_at_a_time_and_a_dead_one_holds_nothing(
    plan: Path, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(monkeypatch)
    folder = tmp_path / "m"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        outcome = memplan("campaign", plan, "--out", folder)
        assert (outcome.status, outcome.out, player.ran) == (2, "", [])
        assert "another campaign is writing to" in outcome.err
        assert memplan("campaign", plan, "--out", folder, "--dry-run").status == 0
        other.kill()
    assert list(folder.iterdir()) == []
    assert memplan("campaign", plan, "--out", folder, "--only", "soon").status == 0


def test_folders_of_dead_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    from memplan.verify.locks import sweep

    old = time.time() - 3600
    names = ("memplan-verify-abcdefgh", "memplan-verify-inuse000", "memplan-verify-x", "other")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "stderr").touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "memplan-verify-justmade").mkdir()
    (tmp_path / "memplan-verify-linked00").symlink_to(tmp_path / "other")
    (tmp_path / "memplan-verify-file0000").touch()
    used = tmp_path / "memplan-verify-inuse000"
    with subprocess.Popen([sys.executable, "-c", HOLD, used], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        sweep(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        other.kill()
    spared = {"memplan-verify-justmade", "memplan-verify-linked00", "memplan-verify-file0000"}
    assert left == spared | set(names[1:])
    assert (tmp_path / "other" / "stderr").exists()


def test_a_record_without_the_dtype_of_4_bit_layers_is_of_the_same_job() -> None:
    # the first measurements were taken before recipes had it resolved
    folder = Path(__file__).resolve().parent.parent / "data" / "measurements"
    first = min(folder.glob("*H200*_qlora_*.json"))
    measured = Measurement.model_validate_json(first.read_text(encoding="utf-8"))
    assert measured.recipe.compute_dtype is None
    now = measured.model_copy(update={"recipe": measured.recipe.resolved()})
    assert now.recipe.compute_dtype == "bfloat16"
    assert fingerprint("cuda", now) == fingerprint("cuda", measured)
