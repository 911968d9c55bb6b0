"""What was tried to break memplan and did not: it stays so. Odd inputs by the thousand: test_fuzz.py;
pickles that would call something: test_snapshot.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from small_specs import config
from test_campaign import Player

from memplan import Recipe, plan
from memplan.asked.gpus import load_gpus
from memplan.verify import measurement, runner
from memplan.verify.measurement import read_all

Memplan = Callable[..., Outcome]


# -- verdicts ----------------------------------------------------------------------------------------------

QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.1-8b", {"mode": "lora", "gradient_checkpointing": True, "seq_len": 4096}),
    ("llama-3.1-8b", {"mode": "qlora", "seq_len": 8192}),
    ("llama-3.2-1b", {"mode": "full", "optimizer": "adamw_torch", "seq_len": 2048}),
    ("gemma-2-2b", {"mode": "qlora", "gradient_checkpointing": False, "seq_len": 1535}),
    ("qwen2.5-0.5b", {"mode": "full", "seq_len": 1024, "batch_size": 4}),
]


@pytest.mark.parametrize(("model", "options"), QUESTIONS, ids=str)
def test_a_larger_card_of_the_same_kind_never_gets_a_worse_verdict(
    model: str, options: dict[str, Any]
) -> None:
    answer = plan(model, Recipe(trainer="peft", **options), gpus=[gpu.name for gpu in load_gpus()])
    kinds: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for gpu, fit in zip(load_gpus(), answer.fits, strict=True):
        rank = ("does not fit", "tight", "fits").index(fit.verdict)
        kinds[gpu.compute_capability, gpu.kind].append((fit.total_bytes, rank))
    assert max(len(cards) for cards in kinds.values()) > 5
    for cards in kinds.values():
        ranks = [rank for _, rank in sorted(cards)]
        assert ranks == sorted(ranks)
    assert len({rank for cards in kinds.values() for _, rank in cards}) > 1


@pytest.mark.parametrize("gpu", ["t4", "4090", "a6000", "h100"])
@pytest.mark.parametrize(("model", "options"), QUESTIONS, ids=str)
def test_plan_and_fit_agree(model: str, options: dict[str, Any], gpu: str, memplan: Memplan) -> None:
    asked = [model, "--json", "--gpu", gpu, "--trainer", "peft"]
    for name, value in options.items():
        option = name.replace("_", "-")
        asked += (
            [f"--{'' if value else 'no-'}{option}"]
            if isinstance(value, bool)
            else [f"--{option}", str(value)]
        )
    planned, judged = memplan("plan", *asked), memplan("fit", "--no-advise", *asked)
    (one,), (other,) = json.loads(planned.out)["fits"], json.loads(judged.out)["fits"]
    assert one == other
    assert (planned.status, judged.status) == (0, int(one["verdict"] == "does not fit"))
    told = [verdict for _, verdict in plan(model, Recipe(trainer="peft", **options), gpus=[gpu]).glances()]
    assert told == [one["verdict"]]


# -- what comes with a stranger's file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.mkdir [planted]",
        "!!python/object/new:os.mkdir [planted]",
        "!!python/object/apply:subprocess.check_call [[mkdir, planted]]",
        "!!python/object/apply:builtins.exec ['import os; os.mkdir(\"planted\")']",
        "!!python/name:os.mkdir",
        "!!python/module:evil",
        "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [planted]",
    ],
)
@pytest.mark.parametrize("place", ["{}", "about: {}", "runs: [{}]", "runs: [{{name: a, model: {}}}]"])
def test_tags_of_a_campaign_run_nothing(
    payload: str, place: str, tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evil.py").write_text("import os\nos.mkdir('planted')\n")
    Path("plan.yaml").write_text(place.format(payload))
    outcome = memplan("campaign", "plan.yaml", "--dry-run")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert not Path("planted").exists()


@pytest.mark.parametrize("family", ["llama", "own"])
@pytest.mark.parametrize(
    "command", [("plan",), ("fit", "--gpu", "t4"), ("trace",), ("verify", "--device", "cpu")]
)
def test_code_that_comes_with_a_model_is_not_run(
    family: str, command: tuple[str, ...], tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "llama" and command[0] == "verify":
        pytest.skip("trains for real, which test_verify.py does")
    monkeypatch.chdir(tmp_path)
    known = config("llama", 1)
    changed = {"model_type": "own", "architectures": ["OwnForCausalLM"]} if family == "own" else {}
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    Path("config.json").write_text(json.dumps({**known, **changed, "auto_map": own}))
    for name in ("modeling_own.py", "configuration_own.py", "torch.py", "transformers.py"):
        Path(name).write_text("import os\nos.mkdir('planted')\n")
    outcome = memplan(command[0], str(tmp_path), *command[1:], "--seq-len", "8")
    assert outcome.status == (2 if family == "own" else 0)
    assert not Path("planted").exists()


# -- what is written ---------------------------------------------------------------------------------------

WRITER = """
import sys
from memplan.files import write_whole
number = 0
while True:
    number += 1
    write_whole(sys.argv[1], bytes([number % 256]) * 3_000_000, "the thing")
"""


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    for pause in (0.0, 0.003, 0.011, 0.02, 0.05):
        path.write_bytes(b"old")
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
            while path.stat().st_size == 3:  # until it is at it
                time.sleep(0.001)
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert content == content[:1] * len(content)


CAMPAIGN = "defaults: {device: cpu}\nruns:\n" + "".join(
    f"  - {{name: run-{number}, model: qwen2.5-0.5b, layers: 1, recipe: {{seq_len: {8 + number}}}}}\n"
    for number in range(12)
)


def test_a_campaign_that_is_interrupted_again_and_again_loses_nothing(
    tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "plan.yaml", tmp_path / "m"
    path.write_text(CAMPAIGN)
    player = Player(monkeypatch)
    moments = cycle(("training", "before it is written", "training", "when it is written"))
    now = [next(moments), 0]  # the moment of this session's interruption, and how many runs it has begun

    def interrupted(moment: str) -> None:
        if now[0] == moment and now[1] > 1:
            raise KeyboardInterrupt

    def run_job(*arguments: Any, **options: Any) -> Any:
        now[1] += 1
        interrupted("training")
        return player(*arguments, **options)

    written = measurement.write

    def write(*arguments: Any) -> Path:
        interrupted("before it is written")
        result = written(*arguments)
        interrupted("when it is written")
        return result

    monkeypatch.setattr(runner, "run_job", run_job)
    monkeypatch.setattr(measurement, "write", write)
    statuses = []
    while not statuses or statuses[-1] == 130:
        before = {found for found, _ in read_all(folder)} if folder.is_dir() else set()
        statuses.append(memplan("campaign", path, "--out", folder, "--resume").status)
        assert before <= {found for found, _ in read_all(folder)}
        now[:] = [next(moments), 0]
    assert statuses == [130] * (len(statuses) - 1) + [0]
    assert len(statuses) > 8
    measured = sorted(one.run.campaign or "" for _, one in read_all(folder))
    assert measured == sorted(f"run-{number}" for number in range(12))
    assert not [found for found in folder.iterdir() if found.name.startswith(".")]


def test_sentences_quote_no_more_than_they_need() -> None:
    from memplan.errors import printable, reason

    assert len(printable("A" * 5000)) == 200
    assert len(reason(KeyError("A" * 5000))) == 200


def test_a_measurement_whose_targets_match_nothing_is_refused() -> None:
    from example_measurements import example

    from memplan.errors import MemplanError
    from memplan.verify.job import predicted_tape

    measured = example()
    wrong = measured.recipe.model_copy(update={"target_modules": "nothing"})
    with pytest.raises(MemplanError):
        predicted_tape(measured.model_copy(update={"recipe": wrong}))


def test_a_run_without_cudnn_s_attention_is_held_against_a_plan_without_it() -> None:
    """Emulated runs have to switch it off, and those of the H200 did: reserved bytes tell them apart."""
    from example_measurements import CARD, example

    from memplan.verify.job import predicted_tape
    from memplan.verify.measurement import Run

    measured = example(device=CARD.model_copy(update={"capability": (9, 0)}))
    recipe = Recipe(trainer="peft", mode="full", seq_len=64).resolved()
    for cudnn in (True, False):
        run = {"recipe": recipe, "run": Run(cudnn_attention=cudnn)}
        taken = predicted_tape(measured.model_copy(update=run)).operations
        assert ("_scaled_dot_product_cudnn_attention" in taken) is cudnn
        assert ("_scaled_dot_product_flash_attention" in taken) is not cudnn
