"""The section "Held against published runs" of docs/accuracy.md, from data/published_comparison.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memplan.asked.gpus import find_gpu

COMPARISON = Path(__file__).resolve().parent.parent / "data" / "published_comparison.json"

HEAD = """\
## Held against published runs

Provenance: *published*. Others ran these and wrote the bytes down; we have no more than what they say.
The byte-exact ones are fms-acceleration's benchmarks: Mistral-7B-v0.1 on an A100-80GB, 4,096 packed tokens
a row, FlashAttention-2, reentrant checkpointing, LoRA r=16 on q, k, v and o with dropout 0.1, AdamW over
foreach lists; peaks are `torch.cuda.max_memory_allocated`'s. They ran **older libraries**:
{rows}.
The plan is of today's. So each run is compared three ways:

- *traced, row's versions*: memplan's tracer over the row's versions of transformers, PEFT, bitsandbytes and
  accelerate, with TRL 0.13.0's casts, but on torch 2.13 instead of 2.4.1
  ({traced}).
  This holds the tracer against real hardware.
- *predicted*: the plan of today's versions, as memplan prints it.
- *with named differences*: what the plan has at the moment of the step at which the published run peaked,
  plus the tensors of the last table of the next section. They leave nothing over, but 2,048 bytes of them
  (1,024 in full fine-tuning) are what was left, not derived.

What a row ran is read from its own columns, from the scripts beside it (as stored at nearby commits) and
from TRL's and transformers' source. The traced bytes confirm dtypes, autocast, casts and vocabulary; whether
checkpointing was reentrant they don't tell, as these peaks are the same either way.

Made by `python benchmarks/published.py` on {date}.

| run | batch | published | traced, row's versions | predicted | with named differences |
| --- | ---: | ---: | ---: | ---: | ---: |
"""

NAMES = {
    "none": "",
    "baseline-peft-bnb": ", PEFT's upcasts",
    "accelerated-peft-bnb": ", no upcasts",
    "foak-fast-kernels-liger": ", Liger",
    "accelerated-peft-bnb-foak-liger": ", no upcasts, Liger",
}

TRACE = """
The traced peaks miss the published ones by 1,024 bytes (full) and by 894,976 or 1,787,904 bytes (the others).
The latter are two things. The logits' shifted copy and its log-softmax each get a segment of their own,
which the allocator rounds to 2 MiB and does not split where 1 MiB or less would be left: 446,464 bytes each
at batch 4, 892,928 at batch 8. The other 2,048 are below. Such rests are no tensors: a plan has them in what
its simulated allocator counts as allocated, not in the peak.

### What has changed since, tensor by tensor

LoRA and QLoRA peaked in the loss's forward then. Today's peak is in the loss's or the last layer's backward,
because the forward has become smaller (bytes at batch 4; *then* is traced with the row's versions):

| run | | forward | loss's backward | layers' backward |
| --- | --- | ---: | ---: | ---: |
"""

SOURCES = """
What made the difference:

- **Loss.** `ForCausalLMLoss` of transformers 4.48 copied the fp32 logits without their last position
  (`logits[..., :-1, :].contiguous()`), positions × vocabulary × 4 bytes; transformers 5 pads the labels
  instead. In the LoRA rows and in QLoRA without upcasts that is the difference: what else has changed
  is a few megabytes at most at any moment of the step. `--loss shifted` plays that loss: LoRA is within
  0.006 % then, QLoRA without upcasts within 0.008 %. Emulated with transformers 4.48.3, PEFT 0.13.2 and
  checkpointing, Llama-3.2-1B in LoRA, QLoRA and full fine-tuning takes what that plan's step does and three
  numbers of its Trainer's loop (1,536 bytes; today's keeps five). It is a loss and not a version: without
  checkpointing, 4.48's SDPA repeated keys and values of grouped heads, which makes 2.6 % more (LoRA,
  4 × 1024). Of one sequence the copy is a view, and takes nothing. From 4.49 on the loss is today's
  (4.57.1, emulated: equal).
- **PEFT's upcasts.** `prepare_model_for_kbit_training` makes embedding and `lm_head` fp32. TRL 0.13's
  `peft_module_casting_to_bf16` made them bf16 again under `bf16=True`; the norms stayed fp32. memplan's
  `kbit_prep` is PEFT's function alone, so the plan of these rows has both matrices in fp32, autocast's bf16
  copy of the head, and an embedding output of twice the size.
- **bitsandbytes.** 0.43 kept one code for the nested quantisation of all layers, 0.50 copies it into each
  (`code.to(A.device, copy=True)`): 1,024 bytes a layer.
- **Full fine-tuning.** transformers 4.48 put only `nn.LayerNorm` into the group without weight decay, so
  Mistral's norms were in the same foreach list as all else and their temporaries are part of the peak (10
  bytes a parameter). transformers 5 goes by name, and updates them after.
- **Rotary embedding.** transformers 5 has a copy of `inv_freq` as a buffer on the card (512 bytes).

*Not* derived: the bytes called the Trainer's. Its loop holds tensors of one number, 512 bytes each (running
loss, last step's loss, gradient norm), which our step does not have. Two of them are alive when full
fine-tuning peaks and three remain after training; both counts fit. In the loss's forward the published bytes
ask for four, of which we can name three. And 32,001 rows in the embeddings are inferred: the script adds a
padding token, and the bytes left after training agree with one row more than the Hub's 32,000.

| run, batch 4 | at the published peak: then more (+) or less (-) than now | bytes |
| --- | --- | ---: |
"""

AFTER = """
### What rests after a step

Weights, states, cuBLAS's workspaces and the batch, against what the Trainer reported as allocated after
training. With PEFT's upcasts the error is embedding and `lm_head` in fp32 (524,304,384 bytes, above); 4-bit
layers have the codes, and everything `inv_freq` and three scalars. The last kilobytes of the Liger rows are
not explained.

| run | batch | published | predicted | error, bytes | % |
| --- | ---: | ---: | ---: | ---: | ---: |
"""

RESERVED = """
### What is reserved

The same runs' highest figure of nvidia-smi, which somebody polled, beside what the simulated allocator
reserves for today's plan on that card. nvidia-smi counts more: the context, and on this card the
{hidden:,} bytes that PyTorch never sees. What it counts more is nearly the same in the four rows of full
fine-tuning and LoRA with stock kernels, {low:.2f} to {high:.2f} GiB, although they reserve from 27 to 74 GiB.
Full fine-tuning at batch 8 reserves 4 GiB *less* than at batch 4: there the simulated allocator runs into
the end of the card, gives its cache back and asks again, as the published run must have done. In the other
rows the peaks differ (above), and the columns with them.

| run | batch | published, nvidia-smi | simulated, after the step | simulated, at most | retries |
| --- | ---: | ---: | ---: | ---: | ---: |
"""

OTHER = """
### Other rows

The Liger rows' loss is planned (`loss: liger`); beside it those runs fuse norms, rotations and, with 4-bit
weights, adapters, which memplan does not model: the plan's excess of up to 4 % is theirs to explain, and we
have not. Up to batch 8 full fine-tuning peaks in the optimizer's step, where those kernels play no part.

The PEFT rows (Llama-3.2-3B, full, L40S) say what is allocated after the optimizer's step, on average over
batches of many lengths. Weights, states, workspaces and gradients are a lower bound, {below:.1f} % below;
what is above it would be the output's bf16 logits, 4 × 128,256 × 2 bytes a position: {positions:.0f}
positions on average, of at most 768.

Not planned:

{skipped}
"""


def section() -> str:
    """The section, in Markdown."""
    comparison: dict[str, Any] = json.loads(COMPARISON.read_text(encoding="utf-8"))
    entries = comparison["rows"]
    planned = [entry for entry in entries if entry["status"] == "planned"]
    partly = [entry for entry in entries if entry["status"] == "partly"]
    versions = comparison["versions"]
    parts = [HEAD.format(rows=versions["rows"], traced=versions["traced"], date=comparison["date"])]
    parts += [_row(entry) for entry in planned + partly]
    parts.append(TRACE)
    smallest = [entry for entry in planned if entry["batch"] == 4]
    parts += [_moments(entry) for entry in smallest if entry["mode"] != "full"]
    parts.append(SOURCES)
    parts += [
        f"| {_name(entry)} | {difference['tensor']} | {difference['bytes']:+,} |\n"
        for entry in smallest
        for difference in entry["accounted"]["differences"]
    ]
    parts.append(AFTER)
    parts += [_after(entry) for entry in planned + partly]
    full = [entry["reserved"] for entry in planned if entry["mode"] != "qlora"]
    rests = [size["published_driver_bytes"] - size["simulated_after_step_bytes"] for size in full]
    a100 = find_gpu("a100-80")
    hidden = a100.total_bytes - a100.visible_bytes
    parts.append(RESERVED.format(hidden=hidden, low=min(rests) / 2**30, high=max(rests) / 2**30))
    parts += [_reserved(entry) for entry in planned + partly]
    parts.append(_other(entries))
    return "".join(parts)


def _name(entry: dict[str, Any]) -> str:
    kind = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[entry["mode"]]
    amp = " (autocast)" if entry["dtype"].endswith("amp") else ""
    return f"{kind}{NAMES[entry['configuration']]}{amp}"


def _size(size: int, percent: float) -> str:
    return f"{size:,} ({percent:+.3f} %)"


def _row(entry: dict[str, Any]) -> str:
    peak = entry["peak"]
    cells = [_name(entry), str(entry["batch"]), f"{peak['published_bytes']:,}"]
    traced = entry.get("traced")
    cells.append(_size(traced["bytes"], traced["error_percent"]) if traced else "–")
    cells.append(_size(peak["predicted_bytes"], peak["error_percent"]))
    accounted = entry.get("accounted")
    cells.append(_size(accounted["predicted_bytes"], accounted["error_percent"]) if accounted else "–")
    return "| " + " | ".join(cells) + " |\n"


def _moments(entry: dict[str, Any]) -> str:
    lines = []
    for words, levels in (("then", entry["traced"]["moments"]), ("today", entry["peak"]["moments"])):
        top = max(levels.values())
        sizes = [levels[part] for part in ("forward", "loss's backward", "layers' backward")]
        cells = [f"**{size:,}**" if size == top else f"{size:,}" for size in sizes]
        lines.append(f"| {_name(entry)} | {words} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def _after(entry: dict[str, Any]) -> str:
    size = entry["after_step"]
    return (
        f"| {_name(entry)} | {entry['batch']} | {size['published_bytes']:,} | {size['predicted_bytes']:,} "
        f"| {size['error_bytes']:+,} | {size['error_percent']:+.4f} |\n"
    )


def _reserved(entry: dict[str, Any]) -> str:
    size = entry["reserved"]
    end = "runs out" if size["simulated_runs_out"] else str(size["simulated_retries"])
    return (
        f"| {_name(entry)} | {entry['batch']} | {size['published_driver_bytes']:,} "
        f"| {size['simulated_after_step_bytes']:,} | {size['simulated_peak_bytes']:,} | {end} |\n"
    )


def _other(entries: list[dict[str, Any]]) -> str:
    floors = [entry["after_step"] for entry in entries if entry["status"] == "after step"]
    reasons = [entry["reason"] for entry in entries if entry["status"] == "not planned"]
    return OTHER.format(
        below=-sum(floor["error_percent"] for floor in floors) / len(floors),
        positions=-sum(floor["error_bytes"] for floor in floors) / len(floors) / (4 * 128_256 * 2),
        skipped="\n".join(f"- {reasons.count(reason)} rows: {reason}" for reason in dict.fromkeys(reasons)),
    )
