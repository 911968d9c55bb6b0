"""Several GPUs on cards that are not there, held against the plan: each case of a table by the real engines.

    python benchmarks/ranks/run.py                     all of them; writes data/ranks.json
    python benchmarks/ranks/run.py --only TEXT         those whose names have it, beside the others' rows
    python benchmarks/ranks/run.py --missing           those that have no row yet
    python benchmarks/ranks/run.py --predictions       the plan's side of each row anew

Needs the environment of benchmarks/dry_gpu/README.md, with DeepSpeed for the cases of ZeRO. The scripts are
benchmarks/plain's, which import nothing of memplan's, launched by accelerate or by torchrun.
Models are real ones with fewer layers. Tensors at the peak are read off the dry run's tape of a step, what is
reserved off its report. Exit status 1 if a case's tensors are not the plan's, or its reserved bytes more than
1 % from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from memplan import Recipe
from memplan.importers.hf import spec_from_config
from memplan.importers.resolve import resolve_config
from memplan.planning import predicted
from memplan.predict.parameters import resolve_recipe
from memplan.tape import replay
from memplan.tape.file import load
from memplan.verify.job import cut

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ROOT / "benchmarks" / "plain"
RESULTS = ROOT / "data" / "ranks.json"
GPU = "a100"
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
DEEPSPEED = ROOT / "benchmarks" / "trainers"  # where transformers' examples of its files are
ENGINES = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [
        "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "false",
    ],
}  # fmt: skip
FLAT = [
    "--use_fsdp", "--fsdp_version", "1", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_sharding_strategy", "FULL_SHARD", "--fsdp_cpu_ram_efficient_loading", "false",
]  # fmt: skip
ZERO = ("zero2", "zero3")
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # which PEFT can adapt under tensor parallel


def _by_file(name: str) -> list[str]:
    """DeepSpeed, as one of its files sets it up."""
    return ["--use_deepspeed", "--deepspeed_config_file", str(DEEPSPEED / f"{name}.json")]


# FSDP1's, as accelerate leaves them and as its questions suggest
FLAT_WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fsdp": (FLAT, {"parallel": "fsdp"}),
    "fsdp ahead": (
        [*FLAT, "--fsdp_backward_prefetch", "BACKWARD_PRE"],
        {"parallel": "fsdp", "backward_prefetch": "backward_pre"},
    ),
    "fsdp behind": (
        [*FLAT, "--fsdp_backward_prefetch", "BACKWARD_POST"],
        {"parallel": "fsdp", "backward_prefetch": "backward_post"},
    ),
    "fsdp both ahead": (
        [*FLAT, "--fsdp_backward_prefetch", "BACKWARD_PRE", "--fsdp_forward_prefetch", "true"],
        {"parallel": "fsdp", "backward_prefetch": "backward_pre", "forward_prefetch": True},
    ),
    "fsdp offload": (
        [*FLAT, "--fsdp_backward_prefetch", "BACKWARD_PRE", "--fsdp_offload_params", "true"],
        {"parallel": "fsdp", "backward_prefetch": "backward_pre", "offload": "both"},
    ),
    "fsdp kept": (
        [*FLAT, "--fsdp_sharding_strategy", "SHARD_GRAD_OP", "--fsdp_backward_prefetch", "BACKWARD_PRE"],
        {"parallel": "fsdp", "backward_prefetch": "backward_pre", "reshard_after_forward": False},
    ),
}
# other ways of DeepSpeed: how they are launched, and the same as a recipe
OTHERWISE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "zero2 offload": (_by_file("zero2_offload"), {"parallel": "zero2", "offload": "optimizer"}),
    "zero3 offload": (_by_file("zero3_offload"), {"parallel": "zero3", "offload": "both"}),
    "zero3 offload optimizer": (
        _by_file("zero3_offload_optimizer"), {"parallel": "zero3", "offload": "optimizer"}
    ),
    # DeepSpeed's own defaults, which accelerate leaves it
    "zero1 defaults": (
        ["--use_deepspeed", "--zero_stage", "1"], {"parallel": "zero1", "overlap_comm": False}
    ),
    "zero2 defaults": (
        ["--use_deepspeed", "--zero_stage", "2"], {"parallel": "zero2", "overlap_comm": False}
    ),
    "zero3 defaults": (
        ["--use_deepspeed", "--zero_stage", "3"],
        {
            "parallel": "zero3", "reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
        },
    ),
    "fsdp2 offload": (
        [*ENGINES["fsdp2"], "--fsdp_offload_params", "true"], {"parallel": "fsdp2", "offload": "both"}
    ),
}  # fmt: skip
# FSDP2's layers stay gathered up to their backward, or the model is there several times
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fsdp2 kept": (
        [*ENGINES["fsdp2"], "--fsdp_reshard_after_forward", "false"],
        {"parallel": "fsdp2", "reshard_after_forward": False},
    ),
    "fsdp hybrid": (
        [*FLAT, "--fsdp_sharding_strategy", "HYBRID_SHARD", "--fsdp_backward_prefetch", "BACKWARD_PRE"],
        {"parallel": "fsdp", "backward_prefetch": "backward_pre", "dp_replicate": 2},
    ),
    **{
        f"hsdp {replicas}": (ENGINES["fsdp2"], {"parallel": "fsdp2", "dp_replicate": replicas})
        for replicas in (2, 4)
    },
}
LAUNCHED = {
    **ENGINES,
    **{name: _by_file(name) for name in ZERO},
    **{name: engine for name, (engine, _) in OTHERWISE.items()},
    **{name: engine for name, (engine, _) in (*FLAT_WAYS.items(), *WAYS.items())},
}
_FIGURES = ("tensors", "reserved", "host")
SCRIPT = {"peft": "hf_trainer.py", "trl": "trl_guide.py"}
FAMILIES = {
    "llama-3.2-1b": 3,  # tied embeddings
    "llama-3.1-8b": 2,
    "qwen2.5-1.5b": 3,  # biases, tied
    "qwen3-4b": 2,  # norms of queries and keys
    "qwen3-30b-a3b": 2,  # experts
}
EXPERTS = ("qwen3-30b-a3b", "mixtral-8x7b")
# whose heads tensor parallel divides, among so many
DIVIDED = {
    "llama-3.2-1b": (3, (4, 8, 2)),
    "llama-3.1-8b": (2, (8, 4, 2)),
    "qwen2.5-1.5b": (3, (2,)),
    "qwen3-4b": (2, (4, 2, 8)),
    "mistral-7b": (2, (2, 8, 4)),
    "qwen3-30b-a3b": (2, (4, 2)),
    "mixtral-8x7b": (2, (8, 4)),
    "gemma-2-2b": (4, (2, 4)),  # whose embedding is scaled; by TRL, which leaves it its eager attention
}
# whose modules ZeRO-3 gathers for otherwise
ALSO = {"olmo-2-1b": 3, "mistral-7b": 2, "phi-3-mini-4k": 3, "gemma-3-1b": 7}


class Case(NamedTuple):
    """A run: how it is launched, and the same as a recipe."""

    name: str
    model: str
    layers: int
    script: str
    arguments: tuple[str, ...]
    recipe: dict[str, Any]
    engine: str

    @property
    def launched(self) -> list[str]:
        """By accelerate, or by torchrun, on as many cards as its recipe has."""
        count = self.recipe["gpus"]
        if self.engine == "tp":  # which no launcher has to know of
            return ["torchrun", "--nproc-per-node", str(count), "--"]
        engine = [*LAUNCHED[self.engine]]
        if self.engine.startswith("hsdp"):
            replicas = self.recipe["dp_replicate"]
            engine += ["--use_parallelism_config", "--parallelism_config_dp_replicate_size", str(replicas)]
            engine += ["--parallelism_config_dp_shard_size", str(count // replicas)]
        return ["accelerate", "launch", "--num_processes", str(count), *engine, "--mixed_precision", "bf16"]


def _environment(case: Case) -> dict[str, str]:
    """Threads bring experts onto the card in no fixed order."""
    threads = case.engine == "tp" and case.model in EXPERTS
    return {"HF_DEACTIVATE_ASYNC_LOAD": "1"} if threads else {}


def cases() -> Iterator[Case]:
    """Families by modes by strategies; worlds, trainers, checkpointing, batches, lengths and accumulation
    take turns. The fewest ranks and many, each way; then ZeRO."""
    turn = 0
    for model, layers in FAMILIES.items():
        for mode in ("full", "lora", "qlora"):
            if mode == "qlora" and model == "qwen3-30b-a3b":
                continue  # bitsandbytes leaves experts as they are
            for parallel in ENGINES:
                for trainer in SCRIPT:
                    for variant in range(2):
                        world = (8, 3)[(turn + variant) // 2 % 2]
                        yield _case(model, layers, mode, parallel, trainer, variant, turn, world)
                        turn += 1
    for parallel in ENGINES:
        for turn, (model, mode) in enumerate((("llama-3.2-1b", "full"), ("qwen3-4b", "lora"))):
            for world in (2, 64):
                yield _case(model, FAMILIES[model], mode, parallel, "peft", 0, turn, world)
    turn = 0
    for model, layers in FAMILIES.items():
        for mode in ("full", "lora", "qlora"):
            for parallel in ZERO:
                if mode == "qlora" and (model == "qwen3-30b-a3b" or parallel == "zero3"):
                    continue  # it does not divide 4-bit weights
                if mode == "lora" and model == "qwen3-30b-a3b" and parallel == "zero3":
                    continue  # refused
                trainer = ("peft", "trl")[(turn + turn // 2) % 2]
                world = (8, 2, 3, 64)[turn % 4]
                yield _case(model, layers, mode, parallel, trainer, turn // 4 % 2, turn, world)
                turn += 1
    for turn, (model, layers) in enumerate(ALSO.items()):
        yield _case(model, layers, "full", "zero3", "peft", 0, turn, 8)
        yield _case(model, layers, "lora", "zero3", "peft", 0, turn, 3)
    turn = 0
    for engine, (_, recipe) in OTHERWISE.items():
        for mode in ("full", "lora", "full", "qlora"):
            if mode == "qlora" and recipe["parallel"] in ("zero3", "fsdp2"):
                continue  # 4-bit weights, which are not divided; of FSDP2 further down
            model = ("llama-3.2-1b", "qwen3-4b", "qwen2.5-1.5b", "llama-3.1-8b")[(turn + turn // 4) % 4]
            trainer = ("peft", "trl")[(turn + turn // 2) % 2]
            if engine == "fsdp2 offload" and mode == "lora":
                trainer = "peft"  # TRL's gathers what NCCL can't send
            world = (8, 2, 3)[turn % 3]
            yield _case(model, FAMILIES[model], mode, engine, trainer, turn // 3 % 2, turn, world)
            turn += 1
    turn = 0
    for model, layers in FAMILIES.items():
        for mode in ("full", "lora", "qlora"):
            if mode == "qlora" and model == "qwen3-30b-a3b":
                continue
            for variant in range(2):
                engine = ("fsdp", "fsdp ahead", "fsdp behind")[turn % 3]
                trainer = ("peft", "trl")[(turn + turn // 4) % 2]
                world = (8, 2, 3, 64)[(turn + turn // 3) % 4]
                yield _case(model, layers, mode, engine, trainer, variant, turn, world)
                turn += 1
    turn = 0
    for engine in ("fsdp both ahead", "fsdp offload"):
        for mode in ("full", "lora", "full", "lora"):
            model = ("llama-3.2-1b", "qwen3-4b", "qwen2.5-1.5b", "llama-3.1-8b")[(turn + turn // 4) % 4]
            trainer = ("peft", "trl")[(turn + turn // 2) % 2]
            world = (8, 64, 3)[turn % 3]
            yield _case(model, FAMILIES[model], mode, engine, trainer, turn // 3 % 2, turn, world)
            turn += 1
    turn = 0
    for model, (layers, counts) in DIVIDED.items():
        for mode in ("full", "lora"):
            for trainer in ("trl",) if model == "gemma-2-2b" else SCRIPT:
                for variant in range(2):
                    world = counts[turn % len(counts)]
                    yield _case(model, layers, mode, "tp", trainer, variant, turn, world)
                    turn += 1
    turn = 0
    for engine, worlds in (
        ("hsdp 2", (4, 8)), ("hsdp 4", (16, 12)), ("fsdp2 kept", (8, 3)), ("fsdp kept", (4, 3)),
        ("fsdp hybrid", (4, 16)),
    ):  # fmt: skip
        for mode in ("full", "lora", "qlora"):
            if mode == "qlora" and engine == "fsdp kept":
                continue  # PyTorch stops
            for variant in range(2):
                model = ("llama-3.2-1b", "qwen3-4b", "qwen2.5-1.5b", "llama-3.1-8b")[(turn + turn // 4) % 4]
                trainer = ("peft", "trl")[(turn + turn // 4) % 2]
                world = worlds[(turn + turn // 2) % 2]
                yield _case(model, FAMILIES[model], mode, engine, trainer, variant, turn, world)
                turn += 1
    for mode in ("lora", "qlora"):  # tied embeddings, without which TRL gathers what NCCL can't send
        yield _case("llama-3.2-1b", 3, mode, "fsdp2 offload", "trl", 0, 2, 4)
    for turn, model in enumerate(("qwen3-4b", "llama-3.1-8b", "qwen2.5-1.5b")):
        world = (8, 3, 2)[turn]
        yield _case(model, FAMILIES[model], "qlora", "fsdp2 offload", "peft", turn % 2, turn + 2, world)


def _case(
    model: str, layers: int, mode: str, engine: str, trainer: str, variant: int, turn: int, world: int
) -> Case:
    _, spread = {**OTHERWISE, **FLAT_WAYS, **WAYS}.get(engine, ([], {"parallel": engine}))
    parallel = spread["parallel"]
    length = (1024, 777, 2048)[turn % 3]
    batch = 1 + (turn % 4 == 3)
    accumulate = 2 if turn % 5 == 4 else 1
    checkpointing = variant == 0 or mode == "qlora"
    recipe: dict[str, Any] = {
        "trainer": trainer, "mode": mode, **spread, "gpus": world, "seq_len": length,
        "batch_size": batch, "gradient_accumulation_steps": accumulate,
    }  # fmt: skip
    given = [
        "--mode", mode, "--length", str(length), "--batch", str(batch), "--accumulate", str(accumulate),
    ]  # fmt: skip
    if mode != "full":
        recipe |= {"r": 8, "lora_alpha": 16}
        given += ["--r", "8"]
        if parallel == "tp":
            chosen = COLWISE[: 3 if model in EXPERTS else None]
            recipe["target_modules"] = list(chosen)
            given += ["--targets", *chosen]
        elif model == "qwen3-30b-a3b":
            recipe["target_modules"] = "attention"
            given += ["--targets", "q_proj", "k_proj", "v_proj", "o_proj"]
        if parallel == "zero3" and trainer == "peft":
            # the script makes the model before TrainingArguments, so that zero.Init has not made it and the
            # engine casts adapters, too
            recipe["adapter_dtype"] = "bfloat16"
    if parallel == "tp":
        given.append("--tp")
    if mode == "qlora":
        given += ["--storage", "bfloat16"]
        if parallel == "fsdp" and trainer == "peft":  # which lays no float32 norms beside 16-bit weights
            recipe["kbit_prep"] = False
            given.append("--no-prepare")
    if trainer == "trl":
        if mode != "full":
            given += ["--dtype", "bfloat16"]
        if mode == "lora":
            recipe["dtype"] = "bfloat16"
    else:
        recipe |= {"autocast": True, "gradient_checkpointing": checkpointing}
        if checkpointing:
            recipe["use_reentrant"] = False
        given += ["--bf16", *(["--checkpointing"] if checkpointing else [])]
    name = f"{model} {mode} {engine} {trainer} {world}" + ("" if variant == 0 else " b")
    return Case(name, model, layers, SCRIPT[trainer], tuple(given), recipe, engine)


def planned(case: Case) -> dict[str, int]:
    """What the plan says: tensors at the peak, what is reserved, and what is offloaded to the host."""
    found = resolve_config(case.model)
    spec = spec_from_config(cut(found.config, case.layers, case.model), found.name, found.hub_id)
    run = predicted.run(spec, resolve_recipe(spec, Recipe(**case.recipe)), rank=0)
    figures = {"tensors": replay(run.tape).allocated_bytes, "reserved": run.free.reserved}
    return figures if "offload" not in case.recipe else {**figures, "host": run.tape.host[0]}


def emulated(case: Case, folder: Path) -> dict[str, Any]:
    """What the real engine took. Raises RuntimeError with the last words of a run that failed."""
    checkpoint, out = folder / f"{case.model}-{case.layers}", folder / "out"
    if not checkpoint.exists():
        _memplan("stub", case.model, str(checkpoint), "--layers", str(case.layers))
    tape = folder / "step.json.gz"
    script = [str(SCRIPTS / case.script), str(checkpoint), "--out", str(out / "peaks.json"), *case.arguments]
    if case.engine == "fsdp hybrid":
        script = [str(HERE / "machines.py"), str(case.recipe["gpus"] // 2), *script]
    out.mkdir(exist_ok=True)
    told = json.loads(
        _memplan(
            "dry-run", "--gpu", f"{case.recipe['gpus']}x{GPU}", "--tape", str(tape), "--json", "--",
            *case.launched, *script, **_environment(case),
        )
    )  # fmt: skip
    read = load(tape)
    return {
        "tensors": replay(read[0] if isinstance(read, tuple) else read).allocated_bytes,
        "reserved": told["reserved_bytes"],
        "host": told["host"]["tensor_bytes"],
        "gpu": told["gpu"],
        "libraries": told["libraries"],
    }


def _memplan(*arguments: str, **given: str) -> str:
    environment = {**os.environ, **QUIET, **given, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ran = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments], env=environment, capture_output=True, text=True
    )
    if ran.returncode not in (0, 1) or not (ran.stdout or arguments[0] == "stub"):
        raise RuntimeError("\n".join(ran.stderr.strip().splitlines()[-12:]))
    return ran.stdout


def row(case: Case, found: dict[str, Any], plan: dict[str, int]) -> dict[str, Any]:
    """A record of a case that was run."""
    figures = {kind: {"predicted": plan[kind], "emulated": found[kind]} for kind in plan}
    return {
        "name": case.name, "model": case.model, "layers": case.layers, "script": case.script,
        "recipe": case.recipe, **figures, "date": date.today().isoformat(), "gpu": found["gpu"],
        "libraries": found["libraries"],
    }  # fmt: skip


def agrees(row: dict[str, Any]) -> bool:
    """Tensors to the byte, reserved bytes to 1 %; on the host all but what a loop keeps there."""
    tensors, reserved = row["tensors"], row["reserved"]
    apart = abs(reserved["predicted"] - reserved["emulated"])
    host = row.get("host", {"predicted": 0, "emulated": 0})
    beside = host["emulated"] - host["predicted"]
    return bool(
        tensors["predicted"] == tensors["emulated"]
        and 100 * apart <= reserved["emulated"]
        and 0 <= beside < 128 << 10
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--predictions", action="store_true")
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        rows = {one["name"]: one for one in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    listed = {case.name: case for case in cases()}
    rows = {name: rows[name] for name in listed if name in rows}
    failed = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for name, case in listed.items():
            if asked.only is not None and asked.only not in name:
                continue
            if asked.missing and name in rows:
                continue
            if asked.predictions:
                if name not in rows:
                    continue
                for kind, size in planned(case).items():
                    rows[name][kind]["predicted"] = size
            else:
                try:
                    rows[name] = row(case, emulated(case, Path(folder)), planned(case))
                except RuntimeError as error:
                    failed.append(name)
                    sys.stdout.write(f"{name}: {error}\n")
                    continue
            one = rows[name]
            apart = (
                f"{one[kind]['predicted'] - one[kind]['emulated']:+,} {kind}"
                for kind in _FIGURES
                if kind in one
            )
            sys.stdout.write(f"{name}: {', '.join(apart)}\n")
            sys.stdout.flush()
            _write([rows[name] for name in listed if name in rows])
    return int(bool(failed) or not all(map(agrees, rows.values())))


def _write(rows: list[dict[str, Any]]) -> None:
    text = json.dumps({"schema_version": 1, "rows": rows}, indent=1)
    RESULTS.with_suffix(".new").write_text(text + "\n", encoding="utf-8")
    RESULTS.with_suffix(".new").replace(RESULTS)


if __name__ == "__main__":
    raise SystemExit(main())
