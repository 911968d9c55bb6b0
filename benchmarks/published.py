"""Hold the plan against peaks that others published: data/published_measurements.json.

    python benchmarks/published.py [--traced FILE]

Plans every row whose source says enough to plan it, prints predicted, published and error, and writes
data/published_comparison.json; every other row is listed with the reason. Needs no torch.

The byte-exact rows are fms-acceleration's benchmarks of Mistral-7B on an A100 (scripts/benchmarks there,
run through fms-hf-tuning's sft_trainer.py and TRL's SFTTrainer). What a row's recipe is, and where from:

- scenarios.yaml: LoRA r = alpha = 16, dropout 0.1, on q, k, v, o; "bf16: True" (autocast) in the bnb and
  Liger scenarios only; defaults.yaml: checkpointing, no accumulation, FlashAttention-2. Both leave
  ``gradient_checkpointing_kwargs`` alone, so transformers 4.48 checkpoints reentrantly, and ``optim``, so
  it is AdamW over foreach lists; ``max_grad_norm`` is 1.
- tokenizer_and_embedding_resize (fms-hf-tuning) adds a ``<pad>`` token: 32,001 rows in both embeddings. The
  bytes after training say so as well (6 bytes x 2 x 4,096 more than the Hub's model needs).
- framework_plugin_bnb.py: NF4, double quantisation, compute dtype bf16; accelerated-peft-bnb prepares the
  model without upcasts, baseline-peft-bnb lets TRL prepare it with PEFT's upcasts.

``--traced FILE`` takes peaks traced with the rows' own library versions (a JSON object);
without it those of the last run are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from memplan import __version__
from memplan.asked.gpus import find_gpu
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.device.fit import context_bytes
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.predict.step import write_tape
from memplan.tape import Category, Phase, Tape, replay, rounded, static_bytes, timeline

DATA = Path(__file__).resolve().parent.parent / "data"
MEASUREMENTS = DATA / "published_measurements.json"
COMPARISON = DATA / "published_comparison.json"

ROW_VERSIONS = (
    "torch 2.4.1, transformers 4.48.1, TRL 0.13.0, PEFT 0.13.2, bitsandbytes 0.43.3, "
    "flash-attn 2.7.3, accelerate 1.0.1"
)
FMS = "fms-acceleration benchmarks"
PEFT = "peft method_comparison MetaMathQA"
OTHERS = {
    "litgpt resource-tables": "litgpt's own model code and FSDP, not transformers'",
    "torchao optim README": "torchtune's own model code; batch and length are not stated",
    "Liger-Kernel op benchmark": "one operator, not a training step",
}
VOCABULARY = 32_001  # 32,000 and <pad>
TOKENS = 4096
MIB = 1 << 20


def rows() -> list[dict[str, Any]]:
    """The published measurements, in the file's order."""
    found: list[dict[str, Any]] = json.loads(MEASUREMENTS.read_text(encoding="utf-8"))["rows"]
    return found


# -- what a row ran ---------------------------------------------------------------------------------------


def spec_of(row: dict[str, Any]) -> ModelSpec:
    """The model as it was trained."""
    spec = resolve(row["model"]).spec
    return spec.model_copy(update={"vocab_size": VOCABULARY}) if row["source"] == FMS else spec


def recipe_of(row: dict[str, Any]) -> Recipe:
    """The row's recipe, as far as today's stack has it."""
    if row["source"] == PEFT:
        return Recipe(
            trainer="peft",
            mode=row["mode"],
            optimizer="adamw_torch",
            gradient_checkpointing=False,
            batch_size=row["batch"],
        )
    options: dict[str, Any] = {
        "mode": row["mode"],
        "autocast": row["dtype"].endswith("amp"),
        "optimizer": "adamw_torch",
        "gradient_checkpointing": True,
        "use_reentrant": True,
        "attn": "flash_attention_2",
        "loss": "liger" if row["framework_config"].endswith("liger") else "standard",
        "batch_size": row["batch"],
        "seq_len": TOKENS,
    }
    if row["mode"] != "full":
        options |= {
            "r": int(float(row["rank"])),
            "lora_alpha": float(row["alpha"]),
            "lora_dropout": 0.1,
            # c_attn, which some scenarios name too, is no layer of Mistral
            "target_modules": tuple(name for name in row["targets"].split() if name != "c_attn"),
            "kbit_prep": row["framework_config"] == "baseline-peft-bnb",
        }
    return Recipe(trainer="peft", **options)


def status_of(row: dict[str, Any]) -> tuple[str, str]:
    """What can be said of a row, and why no more.

    "planned": the stock kernels. "partly": Liger's loss, which we plan, among kernels that we don't.
    "after step": no peak was published, only what is left after a step. "not planned": the rest.
    """
    if row["source"] == PEFT:
        return "after step", "an average over batches of many lengths, sampled after the optimizer's step"
    if row["source"] != FMS:
        return "not planned", OTHERS[row["source"]]
    if row["framework_config"].endswith("liger"):
        return "partly", "Liger's loss is planned; the fused norms, rotations and adapters beside it are not"
    if "foak" in row["framework_config"]:
        return "not planned", "other kernels: fused cross entropy, norms, rotations and adapters"
    return "planned", ""


# -- what has changed since the row's versions --------------------------------------------------------------


def differences(row: dict[str, Any], spec: ModelSpec) -> list[tuple[str, int]]:
    """Tensors that the row's versions held at the published peak and today's don't (or less than 0: the
    other way round), and the allocator's part. Traced with both; each with its source in docs/published.py.
    """
    if row["mode"] == "full":
        norms = (2 * spec.num_hidden_layers + 1) * rounded(2 * spec.hidden_size)
        return [
            ("temporaries of the norms, then in the same foreach list", norms),
            ("original_inv_freq, then on the host", -512),
            ("the Trainer's running loss and gradient norm", 2 * 512),
        ]
    tokens = row["batch"] * TOKENS
    shifted = row["batch"] * (TOKENS - 1) * spec.vocab_size * 4
    found = [
        ("shifted copy of the fp32 logits", rounded(shifted)),
        ("log-softmax, of one position less a row", rounded(shifted) - rounded(tokens * spec.vocab_size * 4)),
        ("padded labels, now", -rounded(row["batch"] * (TOKENS + 1) * 8)),
        ("original_inv_freq, then on the host", -512),
        ("the Trainer's scalars", 4 * 512),
        ("rest of those two blocks, too small to split off", 2 * unsplit_rest(rounded(shifted))),
    ]
    if row["mode"] == "qlora":
        linears = 7 * spec.num_hidden_layers
        found.append(("nested quantisation code, now one a layer", -1024 * linears))
    if row["framework_config"] == "baseline-peft-bnb":
        matrix = rounded(2 * spec.vocab_size * spec.hidden_size)
        table = TOKENS * spec.head_dim
        found += [
            ("embedding and lm_head, cast back to bf16 by TRL", -2 * matrix),
            ("autocast's bf16 copy of lm_head", -matrix),
            ("embedding's output in bf16", -rounded(2 * tokens * spec.hidden_size)),
            ("rotary cos and sin in bf16", -2 * rounded(2 * table)),
        ]
    return found


def unsplit_rest(nbytes: int) -> int:
    """What a block of its own is charged beyond a large tensor: c10/cuda/CUDACachingAllocator.cpp rounds
    the segment to 2 MiB (``kRoundLarge``) and splits nothing off if 1 MiB or less would be left
    (``kSmallSize``, ``should_split``)."""
    rest = -nbytes % (2 * MIB)
    return rest if rest <= MIB else 0


def moments(step: Tape) -> dict[str, int]:
    """The highest level of each part of the step, any of which can be the peak."""
    levels: dict[str, int] = {}
    for point in timeline(step):
        if point.phase is not Phase.SETUP:
            part = "layers' backward" if point.phase is Phase.BACKWARD and point.layer is not None else ""
            name = part or ("loss's backward" if point.phase is Phase.BACKWARD else point.phase.value)
            levels[name] = max(levels.get(name, 0), point.allocated_bytes)
    return levels


def reserved(spec: ModelSpec, recipe: Recipe, row: dict[str, Any]) -> dict[str, Any]:
    """What the allocator would reserve for today's run on the row's card, beside what nvidia-smi showed."""
    gpu = find_gpu("a100-80")
    run = predicted.run(spec, recipe, looped=False)  # another Trainer's, whose own numbers are named below
    found = run.within(gpu.visible_bytes - context_bytes(gpu, run.card), gpu.visible_bytes)
    return {
        "published_driver_bytes": row["nvidia_smi_peak"],
        "simulated_peak_bytes": found.reserved,
        "simulated_after_step_bytes": found.after_step,
        "simulated_retries": found.retries,
        "simulated_runs_out": found.ran_out is not None,
    }


# -- the comparison -------------------------------------------------------------------------------------


def error(predicted: int, published: float) -> dict[str, Any]:
    """Two sizes and how far the first is off."""
    return {
        "predicted_bytes": predicted,
        "published_bytes": published,
        "error_bytes": predicted - published,
        "error_percent": percent(predicted - published, published),
    }


def percent(part: float, whole: float) -> float:
    """To four places; 0.0 rather than -0.0."""
    return round(100 * part / whole, 4) + 0.0


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the comparison, without what was traced."""
    status, reason = status_of(row)
    entry: dict[str, Any] = {"ref": row["ref"], "model": row["model"], "mode": row["mode"]}
    entry |= {"configuration": row.get("framework_config"), "dtype": row.get("dtype")}
    entry |= {"batch": row.get("batch"), "gpu": row["gpu"], "status": status, "reason": reason}
    if status == "not planned":
        return entry | {"published_bytes": row["bytes"]}
    spec, recipe = spec_of(row), recipe_of(row).resolved()
    step = write_tape(spec, recipe)
    before, peak = static_bytes(step), replay(step)
    if status == "after step":
        del before[Category.ACTIVATIONS]  # the batch, whose length is not known
        gradients = max(point.by_category[Category.GRADIENTS] for point in timeline(step))
        floor = sum(before.values()) + gradients
        return entry | {"after_step": error(floor, row["bytes"])}
    entry["peak"] = error(peak.allocated_bytes, row["bytes"])
    entry["peak"] |= {"phase": peak.phase.value, "operation": peak.operation}
    entry["after_step"] = error(sum(before.values()), row["torch_alloc_after_train"])
    entry["reserved"] = reserved(spec, recipe, row)
    if status == "planned":
        named = differences(row, spec)
        levels = entry["peak"]["moments"] = moments(step)
        then = levels["optimizer" if row["mode"] == "full" else "forward"]  # where the published run peaked
        accounted = then + sum(size for _, size in named)
        entry["accounted"] = error(accounted, row["bytes"]) | {
            "predicted_then_bytes": then,
            "differences": [{"tensor": tensor, "bytes": size} for tensor, size in named],
        }
    return entry


def comparison(traced: dict[str, Any]) -> dict[str, Any]:
    """The whole file."""
    entries = [compare(row) for row in rows()]
    for entry in entries:
        if entry["ref"] in traced["peaks"]:
            peak = traced["peaks"][entry["ref"]]
            published = entry["peak"]["published_bytes"]
            entry["traced"] = {
                **peak,
                "error_bytes": peak["bytes"] - published,
                "error_percent": percent(peak["bytes"] - published, published),
            }
    return {
        "about": "Published peaks held against the plan: output of benchmarks/published.py.",
        "date": date.today().isoformat(),
        "versions": {"memplan": __version__, "rows": ROW_VERSIONS, "traced": traced["versions"]},
        "rows": entries,
    }


def lines(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The comparison for a terminal."""
    head = ("predicted", "published", "error")
    yield f"{'row':38} batch " + " ".join(f"{word:>15}" for word in head) + f" {'%':>8} {'traced %':>8}"
    for entry in entries:
        name = f"{entry['mode']} {entry['configuration'] or entry['ref'].rpartition('/')[2]}"[:38]
        size = entry.get("peak") or (entry.get("after_step") if entry["status"] == "after step" else None)
        if size is None:
            continue
        traced = f"{entry['traced']['error_percent']:+8.4f}" if "traced" in entry else ""
        mark = "" if entry["status"] == "planned" else f"  {entry['status']}"
        yield (
            f"{name:38} {entry['batch']:>5} {size['predicted_bytes']:>15,} {size['published_bytes']:>15,.0f} "
            f"{size['error_bytes']:>+15,.0f} {size['error_percent']:>+8.3f} {traced:>8}{mark}"
        )
        if "accounted" in entry:
            accounted = entry["accounted"]
            yield (
                f"{'  with the named differences':38} {'':>5} {accounted['predicted_bytes']:>15,} {'':>15} "
                f"{accounted['error_bytes']:>+15,} {accounted['error_percent']:>+8.3f}"
            )
    yield ""
    for reason in dict.fromkeys(entry["reason"] for entry in entries if entry["status"] == "not planned"):
        count = sum(entry["reason"] == reason for entry in entries)
        yield f"not planned, {count} rows: {reason}"


def kept() -> dict[str, Any]:
    """The traced peaks of the last run."""
    if not COMPARISON.is_file():
        return {"versions": "", "peaks": {}}
    last = json.loads(COMPARISON.read_text(encoding="utf-8"))
    own = ("bytes", "phase", "operation", "moments")
    peaks = {
        entry["ref"]: {key: entry["traced"][key] for key in own}
        for entry in last["rows"]
        if "traced" in entry
    }
    return {"versions": last["versions"]["traced"], "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--traced",
        metavar="FILE",
        type=Path,
        help='{"versions": "...", "peaks": {ref: {"bytes", "phase", "operation", "moments"}}}',
    )
    given = parser.parse_args().traced
    traced = json.loads(given.read_text(encoding="utf-8")) if given else kept()
    found = comparison(traced)
    COMPARISON.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in lines(found["rows"]):
        print(line)


if __name__ == "__main__":
    main()
