"""What `memplan dry-run` has to find in small programs whose ways are known; for .ci/run, in the environment
of benchmarks/dry_gpu/README.md:

    python benchmarks/dry_gpu/answers.py

Exit status 1 with the first that does not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memplan.tape import Category, Phase, replay
from memplan.tape.file import load

MIB = 1 << 20

LOOP = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for number in range(1, 100):
    {before}
    model.train()
    loss = model(torch.randn({rows}, 1024, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    {after}
"""
EVALUATES = """
    if number == 5:
        model.eval()
        with torch.no_grad():
            model(torch.randn(65536, 1024, device="cuda"))
        torch.save(model.state_dict(), "{folder}/model.pt")
"""
OWN_PEAK = """
    high = max(torch.cuda.max_memory_allocated(), high if number > 1 else 0)
    assert torch.cuda.max_memory_allocated() == torch.accelerator.max_memory_allocated() == high
"""
CHECKPOINTED = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)).cuda()
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, foreach=True)
for _ in range(3):
    x = torch.randn(16, 1024, device="cuda")
    model.train()(x)  # so that the modules are known
    checkpoint(model, x, use_reentrant=False).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SURVIVES = """
    if number == 3:
        try:
            torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            break
"""
TWO_OPTIMIZERS = """
import torch
from torch import nn

small, large = nn.Linear(16, 16).cuda(), nn.Linear(4096, 4096, bias=False).cuda()
first, second = torch.optim.SGD(small.parameters()), torch.optim.Adam(large.parameters(), foreach=False)
for _ in range(5):
    small(torch.randn(4, 16, device="cuda")).sum().backward()
    large(torch.randn(4, 4096, device="cuda")).sum().backward()
    first.step(), second.step()
    first.zero_grad(), second.zero_grad()
"""
SEEN = (
    """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
import torch
assert torch.cuda.device_count() == 1, torch.cuda.device_count()
"""
    + TWO_OPTIMIZERS
)
TRAINER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4)
rows = [{{"input_ids": [7] * 128, "labels": [7] * 128}} for _ in range(64)]
arguments = TrainingArguments("{folder}/out", per_device_train_batch_size=2, report_to="none",
                              eval_strategy="steps", eval_steps=1000, save_steps=1000, max_steps=2000)
Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, eval_dataset=rows[:16]).train()
"""
ROUTER = """
import torch
from torch import nn

layer = nn.Linear(64, 8).cuda()
optimizer = torch.optim.SGD(layer.parameters(), 0.1)
scores = layer(torch.randn(32, 64, device="cuda"))
chosen = scores.topk(2, -1).indices
counts = torch.bincount(chosen.flatten(), minlength=8).tolist()
assert counts == {counts}, counts
scores.sum().backward()
optimizer.step()
"""


def asked(folder: Path, program: str, *options: str, gpu: str = "4090", status: int = 0) -> dict[str, Any]:
    """memplan's answer on a program."""
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "memplan", "dry-run", "--json", "--gpu", gpu, *options]
    done = subprocess.run(
        [*command, "--", sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == status, (done.returncode, done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def allocated(found: dict[str, Any]) -> list[int]:
    """Of each step."""
    return [step["allocated_bytes"] for step in found["steps"]]


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="answers-") as place:
        folder = Path(place)

        plain = asked(folder, LOOP.format(rows=4096, before="", after=""))
        assert len(plain["steps"]) == 3 and plain["evaluation"] is plain["saving"] is None
        weights = 2 * (1024 * 1024 + 1024) * 4
        assert plain["steps"][1]["resting_bytes"] >= 3 * weights  # with AdamW's two states

        puts_back = "torch.cuda.reset_peak_memory_stats()"
        same = asked(folder, LOOP.format(rows=4096, before="", after=puts_back))
        assert allocated(same) == allocated(plain), (allocated(same), allocated(plain))
        late = LOOP.format(rows=4096, before="", after="").replace(
            "optimizer.step()", f"{puts_back}; optimizer.step()"
        )
        assert allocated(asked(folder, late)) == allocated(plain)

        shrinks = LOOP.format(rows="(4096 if number == 1 else 16)", before="", after=OWN_PEAK.strip())
        first, second, third = allocated(asked(folder, shrinks))
        assert second == third < first - 2 * 4096 * 1024 * 4, (first, second, third)

        again = asked(folder, CHECKPOINTED)["peak"]
        made = sum(one["bytes"] for one in again["largest"] if one["phase"] == "backward")
        assert made >= weights, again  # all gradients

        gives_up = asked(folder, LOOP.format(rows=16, before=SURVIVES.strip(), after=""), status=1)
        assert gives_up["ran_out"]["step"] == 3 and gives_up["needed_bytes"] is None
        two = asked(folder, TWO_OPTIMIZERS, "--steps", "1")["allocated_bytes"]
        assert two > 5 * 4096 * 4096 * 4, two  # weights, gradients, two states, and one for a moment
        assert asked(folder, SEEN, "--steps", "1", gpu="2x4090")["allocated_bytes"] == two

        evaluates = LOOP.format(rows=4096, before="", after=EVALUATES.format(folder=folder).strip())
        found = asked(folder, evaluates, "--eval", "--save")
        assert len(found["steps"]) == 5, len(found["steps"])
        assert found["evaluation"]["allocated_bytes"] > 2 * 65536 * 1024 * 4 - MIB
        assert max(allocated(found)) < found["evaluation"]["allocated_bytes"]
        assert found["saving"]["resting_bytes"] > 0 and (folder / "model.pt").is_file()
        assert found["reserved_bytes"] >= found["evaluation"]["reserved_bytes"]
        assert len(asked(folder, evaluates)["steps"]) == 3

        page = folder / "ended.html"
        ended = asked(folder, LOOP.format(rows=1 << 21, before="", after=""), "--html", str(page), status=1)
        assert ended["verdict"] == "does not fit" and ended["ran_out"]["step"] == 1
        assert ended["ran_out"]["own"].startswith("program.py:"), ended["ran_out"]
        assert "up to there" in page.read_text(encoding="utf-8")

        tape, page, snapshot = (folder / name for name in ("step.json.gz", "page.html", "memory.pickle"))
        files = ("--tape", str(tape), "--html", str(page), "--snapshot", str(snapshot))
        found = asked(folder, TRAINER.format(folder=folder), "--eval", "--save", *files)
        assert len(found["steps"]) == 3 and found["evaluation"] and found["saving"], found["notes"]
        assert list((folder / "out").glob("checkpoint-3/*.safetensors"))
        step = load(tape)[0]
        peak = replay(step)
        assert step.provenance == "emulated"
        assert 0 <= found["steps"][-1]["allocated_bytes"] - peak.allocated_bytes < MIB
        phases = {segment.phase for segment in step.segments}
        assert phases >= {Phase.SETUP, Phase.FORWARD, Phase.BACKWARD}, phases
        used = set(step.categories)
        absent = {Category.ADAPTERS, Category.QUANTIZATION_STATE, Category.COMMUNICATION}
        assert used == set(Category) - absent, used
        assert page.read_text(encoding="utf-8").count("<section>") >= 4 and snapshot.stat().st_size > 0

        asked(folder, ROUTER.format(counts=[8] * 8), "--steps", "1")
        asked(folder, ROUTER.format(counts=[32, 32, *[0] * 6]), "--steps", "1", "--routing", "skewed")
    print("answers: all as they have to be")


if __name__ == "__main__":
    main()
