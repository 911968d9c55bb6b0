"""Holds predicted steps against traced ones: the same peak to the byte, in the same phase, operation, layer.

    python benchmarks/reconcile.py [--jobs N] [--out FILE] [--only TEXT] [--fresh]

Cases are chosen by pairwise cover: every two values of any two options meet in some case, as far as the
library's own validation lets them. Models are those of the registry with few layers of true size, and some
with all of theirs. Results are written as they come, so that an interrupted run goes on where it was; a run
after a change of memplan or of a library starts again. Exit status 1 if a case deviates that
benchmarks/deviations.json does not declare, or if a declared one agrees.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import random
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.errors import RecipeError, TraceError
from memplan.importers.hf import spec_from_config
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.tape import Peak, Phase, Tape, replay, static_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "reconciliation.json"
DEVIATIONS = ROOT / "benchmarks" / "deviations.json"
SOURCES = (
    "asked", "stacks", "cuda", "tape", "shadow", "parts", "weights", "adapters", "attention", "losses",
    "optimizers", "families", "towers", "predict", "trace", "strategies",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger-kernel")

Case = dict[str, Any]  # model, layers (None: all), and a recipe's options

# -- the matrix --------------------------------------------------------------------------------------------

# Aliases of the registry, some with a change of the config: a window that bites.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b-v0.1, window 500": ("mistral-7b-v0.1", {"sliding_window": 500}),
    "gpt-oss-20b, in 16 bits": ("gpt-oss-20b", {"quantization_config": None}),
}
LAYERS = {
    "llama-3.2-1b": 2,  # tied
    "llama-3.1-8b": 2,
    "llama-2-7b": 2,  # as many key heads as query heads
    "smollm2-135m": 2,  # nine heads
    "mistral-7b-v0.1": 2,
    "mistral-7b-v0.1, window 500": 2,
    "qwen2.5-0.5b": 2,  # tied
    "qwen2.5-7b": 2,
    "qwen3-0.6b": 2,  # tied
    "qwen3-8b": 2,
    "gemma-2-2b": 2,
    "gemma-3-1b": 7,  # five local layers, a global one, a local one
    "gemma-3-4b": 7,
    "phi-3-mini-4k": 2,  # its window of 2,047 bites at 2,048 tokens
    "phi-4-mini": 2,  # tied, rotates three quarters of a head
    "olmo-2-1b": 2,
    "mixtral-8x7b": 2,
    "qwen3-30b-a3b": 2,
    "gemma-2b": 2,
    "olmo-3-7b": 4,  # three local layers, a global one
    "smollm3-3b": 4,  # every fourth does not rotate
    "qwen3.5-27b": 4,  # three linear ones, a full one
    "qwen3.5-35b-a3b": 4,
    "gemma-4-31b": 6,  # five local ones, a global one
    "gemma-4-26b-a4b": 6,
    "gpt-oss-20b, in 16 bits": 2,
    "granite-3.3-8b": 2,
    "seed-oss-36b": 2,
    "glm-4.5-air": 2,  # a dense one, a mixture
    "stablelm-2-1.6b": 2,
    "qwen1.5-moe-a2.7b": 2,
    "glm-4.7-flash": 3,  # the first is dense
    "deepseek-v2-lite": 3,
}

# Values of each factor. A value of several options is a dict; None stands for "does not apply".
FACTORS: dict[str, list[Any]] = {
    "model": list(LAYERS),
    "optimizer": [
        "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "lion_8bit", "paged_lion_8bit", "adafactor", "sgd",
    ],
    "mode": ["full", "lora", "qlora"],
    "target_modules": [None, "all-linear", "attention", "q,v"],
    "checkpointing": ["none", "reentrant", "not reentrant"],
    "attn": ["sdpa", "eager", "flash_attention_2"],
    "loss": ["standard", "chunked", "liger"],
    "shape": [(1, 2048), (2, 513), (3, 7), (4, 1), (1, 127)],
    "batches": ["full", "padded", "packed"],
    "dtype": ["bfloat16", "float16", "float32"],
    "autocast": [False, True],
    "adapter_dtype": [None, "float32", "as base"],
    "lora_dropout": [None, 0.0, 0.05],
    "use_dora": [None, False, True],
    "modules_to_save": [None, (), ("lm_head",), ("embed_tokens", "lm_head"), ("norm",)],
    "kbit_prep": [None, True, False],
    "double_quant": [None, True, False],
    "quant_type": [None, "nf4", "fp4"],
    "kernels": [None, "stock", "memplan"],
    "compute_dtype": [None, "bfloat16", "float16", "float32"],
    "trainer": ["peft", "trl"],
    "gradient_accumulation_steps": [1, 2],
    "max_grad_norm": [0.0, 1.0],
    "momentum": [None, 0.0, 0.9],
}  # fmt: skip
_OF_ADAPTERS = ("target_modules", "adapter_dtype", "lora_dropout", "use_dora", "modules_to_save")
_OF_FOUR_BITS = ("kbit_prep", "double_quant", "quant_type", "kernels", "compute_dtype")

FULL_DEPTH: list[Case] = [
    {"model": "llama-3.2-1b", "mode": "full"},
    {"model": "qwen2.5-0.5b", "mode": "lora", "gradient_checkpointing": True, "batch_size": 2},
    {"model": "qwen2.5-0.5b", "mode": "full", "optimizer": "adamw_torch", "attn": "eager", "seq_len": 513},
    {"model": "gemma-3-1b", "mode": "lora", "lora_dropout": 0.05, "seq_len": 700},
    {"model": "llama-3.1-8b", "mode": "qlora", "autocast": True},
    {"model": "llama-3.3-70b", "mode": "qlora"},
    {"model": "llama-3.3-70b", "mode": "qlora", "kbit_prep": False},
    {"model": "llama-3.3-70b", "mode": "qlora", "kbit_prep": False, "kernels": "memplan"},
    {"model": "qwen3-30b-a3b", "mode": "lora", "target_modules": "attention", "gradient_checkpointing": True},
    {
        "model": "llama-3.1-8b",
        "mode": "lora",
        "loss": "liger",
        "gradient_checkpointing": True,
        "seq_len": 8192,
    },
    {"model": "qwen3-30b-a3b", "mode": "qlora", "target_modules": "attention", "loss": "chunked"},
    {
        "model": "llama-3.2-1b",
        "mode": "lora",
        "loss": "shifted",
        "gradient_checkpointing": True,
        "batch_size": 2,
    },
    {"model": "llama-3.3-70b", "mode": "qlora", "trainer": "trl"},
    {"model": "llama-3.1-8b", "mode": "lora", "trainer": "trl"},
    {"model": "llama-3.2-1b", "mode": "full", "trainer": "trl"},
    {"model": "llama-3.1-8b", "mode": "qlora", "trainer": "llama_factory"},
]


def case_of(chosen: dict[str, Any]) -> Case:
    """A case from one value of each factor."""
    case: Case = {"model": chosen["model"], "layers": LAYERS[chosen["model"]]}
    case["batch_size"], case["seq_len"] = chosen["shape"]
    case["gradient_checkpointing"] = chosen["checkpointing"] != "none"
    if case["gradient_checkpointing"]:
        case["use_reentrant"] = chosen["checkpointing"] == "reentrant"
    for name, value in chosen.items():
        if name not in ("model", "shape", "checkpointing") and value is not None:
            case[name] = value
    if case.get("adapter_dtype") == "as base":
        case["adapter_dtype"] = case["dtype"]
    return case


def allowed(chosen: dict[str, Any]) -> bool:
    """Whether the values, which may lack some factors, go together."""
    mode = chosen.get("mode")
    for names, applies in (
        (_OF_ADAPTERS, None if mode is None else mode != "full"),
        (_OF_FOUR_BITS, None if mode is None else mode == "qlora"),
        (("momentum",), None if "optimizer" not in chosen else chosen["optimizer"] == "sgd"),
    ):
        for name in names:
            if name in chosen and applies is not None and (chosen[name] is not None) is not applies:
                return False
    if chosen.get("dtype") == "float32" and chosen.get("adapter_dtype") == "as base":
        return False  # the same as float32
    of_family = {name: chosen[name] for name in ("attn", "loss", "dtype", "batches") if name in chosen}
    if not _goes_with(chosen.get("model"), tuple(of_family.items())):
        return False
    if mode == "full" and chosen.get("dtype") == "float16" and chosen.get("autocast"):
        return False  # its scaler refuses gradients in fp16
    if chosen.get("batches") == "padded" and chosen.get("shape", (1, 2))[1] == 1:
        return False  # no row is shorter
    if chosen.get("kernels") == "memplan" and (chosen.get("quant_type") == "fp4" or chosen.get("use_dora")):
        return False  # they decode NF4, and compute plain LoRA
    if len(chosen) < len(FACTORS):
        return True
    case = case_of(chosen)
    try:
        resolved(case)
    except RecipeError:
        return False
    return True


@cache
def _goes_with(model: str | None, options: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the model's family takes these options, whatever the others are."""
    if model is None:
        return True
    case = {"model": model, "layers": LAYERS[model], "mode": "lora", "target_modules": "attention"}
    try:
        resolved({**case, "attn": "eager", **dict(options)})
    except RecipeError:
        return False
    return True


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(tries: int = 40, at_least: int = 0) -> tuple[list[Case], list[Pair]]:
    """Cases in which all pairs of values meet, and the pairs that can't. Greedy and always the same."""
    dice = random.Random(4)
    names = list(FACTORS)
    missing: dict[Pair, None] = {}
    for one, two in itertools.combinations(names, 2):
        for pair in itertools.product(FACTORS[one], FACTORS[two]):
            if allowed(dict(zip((one, two), pair, strict=True))):
                missing[(one, pair[0]), (two, pair[1])] = None
    cases: list[Case] = []
    impossible: list[Pair] = []

    def pairs(chosen: dict[str, Any]) -> list[Pair]:
        return list(itertools.combinations(((name, chosen[name]) for name in names if name in chosen), 2))

    def grown(seed: dict[str, Any]) -> dict[str, Any] | None:
        chosen = dict(seed)
        rest = [name for name in names if name not in chosen]
        dice.shuffle(rest)
        # what decides whether others apply comes first
        rest.sort(key=lambda name: name not in ("mode", "optimizer"))
        for name in rest:
            values = [value for value in FACTORS[name] if name_allowed(chosen, name, value)]
            if not values:
                return None
            dice.shuffle(values)
            chosen[name] = max(values, key=lambda value: gain(chosen, name, value))
        return chosen if allowed(chosen) else None

    def name_allowed(chosen: dict[str, Any], name: str, value: Any) -> bool:
        if len(chosen) + 1 == len(FACTORS):
            return True  # grown() asks in the end
        return allowed({**chosen, name: value})

    def gain(chosen: dict[str, Any], name: str, value: Any) -> int:
        number = names.index(name)
        return sum(
            (((other, chosen[other]), (name, value)) if names.index(other) < number
             else ((name, value), (other, chosen[other]))) in missing
            for other in chosen
        )  # fmt: skip

    while missing:
        seed = next(iter(missing))
        found: list[dict[str, Any]] = []
        for _ in range(10):  # more tries before a pair counts as impossible
            candidates = [grown(dict(seed)) for _ in range(tries)]
            found = [chosen for chosen in candidates if chosen is not None]
            if found:
                break
        if not found:
            impossible.append(seed)
            del missing[seed]
            continue
        best = max(found, key=lambda chosen: sum(pair in missing for pair in pairs(chosen)))
        for pair in pairs(best):
            missing.pop(pair, None)
        cases.append(case_of(best))
    while len(cases) < at_least:
        chosen = grown({"model": dice.choice(FACTORS["model"])})
        if chosen is not None and case_of(chosen) not in cases:
            cases.append(case_of(chosen))
    return cases, impossible


def matrix() -> list[Case]:
    """All cases: at full depth, then those of the cover."""
    deep = [{"layers": None, **case} for case in FULL_DEPTH]
    return deep + pairwise(at_least=252)[0]


def label(case: Case) -> str:
    """A case in a line."""
    layers = "all layers" if case["layers"] is None else f"{case['layers']} layers"
    options = (f"{name}={_word(value)}" for name, value in case.items() if name not in ("model", "layers"))
    return f"{case['model']}, {layers}: {' '.join(options)}"


def _word(value: Any) -> str:
    return "+".join(value) or "none" if isinstance(value, (tuple, list)) else str(value)


@cache
def registry() -> dict[str, dict[str, Any]]:
    models = json.loads((ROOT / "data" / "model_specs.json").read_text(encoding="utf-8"))["models"]
    return {model["alias"]: model["config"] for model in models}


def config_of(case: Case) -> dict[str, Any]:
    """The config.json of the case's model, with as many layers as the case has."""
    alias, changes = VARIANTS.get(case["model"], (case["model"], {}))
    config = {**registry()[alias], **changes}
    if case["layers"] is not None:
        config["num_hidden_layers"] = case["layers"]
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][: case["layers"]]
    return config


def resolved(case: Case, config: dict[str, Any] | None = None) -> Recipe:
    options = {name: value for name, value in case.items() if name not in ("model", "layers")}
    spec = spec_from_config(config or config_of(case), case["model"])
    return resolve_recipe(spec, Recipe(**{"trainer": "peft", **options}))


# -- one case ----------------------------------------------------------------------------------------------


def compare(case: Case, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Plan and trace a case: a record for data/reconciliation.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate
        from memplan.trace import trace

        config = config or config_of(case)
        spec = spec_from_config(config, case["model"])
        recipe = resolved(case, config)
        start = time.perf_counter()
        predicted = write_tape(spec, recipe)
        planned = time.perf_counter()
        try:
            traced = trace(dict(config), recipe)
        except TraceError as error:
            return {"case": case, "family": spec.model_type, "agrees": False, "error": str(error)}
        done = time.perf_counter()
        whole = write_tape(spec, recipe, folded=False)
    peaks = [replay(tape) for tape in (predicted, traced)]
    places = [_place(peak) for peak in peaks]
    statics, peak_categories = (
        [{kind.value: size for kind, size in sizes.items() if size} for sizes in pair]
        for pair in ([static_bytes(predicted), static_bytes(traced)], [peak.by_category for peak in peaks])
    )
    record = {
        "case": case,
        "family": spec.model_type,
        "agrees": places[0] == places[1],
        "predicted": places[0],
        "traced": places[1],
        "static_agrees": statics[0] == statics[1],
        "categories_agree": peak_categories[0] == peak_categories[1],
        "step_agrees": _allocations(whole) == _allocations(traced),
        "allocations": len(_allocations(traced)),
        "seconds": {"predicted": round(planned - start, 4), "traced": round(done - planned, 2)},
    }
    for name, pair in (("static", statics), ("categories", peak_categories)):
        if pair[0] != pair[1]:
            kinds = sorted({*pair[0], *pair[1]})
            record[f"{name}_differ"] = {
                kind: [pair[0].get(kind, 0), pair[1].get(kind, 0)]
                for kind in kinds
                if pair[0].get(kind, 0) != pair[1].get(kind, 0)
            }
    if not record["step_agrees"]:
        record["first_difference"] = _first_difference(whole, traced)
    return record


def _place(peak: Peak) -> dict[str, Any]:
    return {
        "peak_bytes": peak.allocated_bytes,
        "phase": peak.phase.value,
        "operation": peak.operation,
        "layer": peak.layer,
    }


def _allocations(tape: Tape) -> list[tuple[int, int]]:
    """Each allocation of the step: its bytes, and the live bytes after it."""
    return [(size, live) for size, live, _ in _births(tape)]


def _births(tape: Tape) -> list[tuple[int, int, str]]:
    live, found = 0, []
    for segment in tape.segments:
        for position in range(segment.start, segment.stop):
            event = tape.events[position]
            live += tape.deltas[position]
            if event >= 0 and segment.phase is not Phase.SETUP:
                place = (segment.phase.value, segment.layer, tape.modules[event], tape.operations[event])
                where = " ".join(map(str, place))
                found.append((tape.sizes[event], live, where))
    return found


def _first_difference(predicted: Tape, traced: Tape) -> list[list[Any] | None]:
    """The first allocation of the step that differs: bytes, live bytes, phase, layer, module, operation."""
    for one, two in itertools.zip_longest(_births(predicted), _births(traced)):
        if one is None or two is None or one[:2] != two[:2]:
            return [one and list(one), two and list(two)]
    return []


# -- known deviations --------------------------------------------------------------------------------------


def known_deviations() -> list[dict[str, Any]]:
    """Each: ``case`` (options a case must have), ``tensor``, ``reason``, ``bytes`` (predicted - traced)."""
    deviations: list[dict[str, Any]] = json.loads(DEVIATIONS.read_text(encoding="utf-8"))["deviations"]
    return deviations


def declared(case: Case, deviations: list[dict[str, Any]]) -> dict[str, Any] | None:
    for deviation in deviations:
        if all(case.get(name) == value for name, value in deviation["case"].items()):
            return deviation
    return None


def complaints(results: list[dict[str, Any]], deviations: list[dict[str, Any]]) -> list[str]:
    """What is not as it should be: a deviation that nobody declared, a declared one that is no more."""
    found = []
    for result in results:
        known = declared(result["case"], deviations)
        if known is None:
            if not result["agrees"]:
                found.append(f"deviates: {label(result['case'])}\n  {difference(result)}")
        elif "error" in result or result["agrees"]:
            found.append(f"declared to deviate ({known['tensor']}), but does not: {label(result['case'])}")
        elif result["predicted"]["peak_bytes"] - result["traced"]["peak_bytes"] != known["bytes"]:
            found.append(f"deviates by other than {known['bytes']}: {label(result['case'])}")
    return found


def difference(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"traced: {result['error']}"
    one, two = result["predicted"], result["traced"]
    off = one["peak_bytes"] - two["peak_bytes"]
    return f"predicted {tuple(one.values())}, traced {tuple(two.values())}: {off:+,} bytes"


# -- the run -----------------------------------------------------------------------------------------------


def source_hash() -> str:
    """Of all that a result depends on in this repository."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for file in sorted((ROOT / "memplan" / room).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(cases: list[Case], out: Path, jobs: int, fresh: bool) -> list[dict[str, Any]]:
    about = {
        "about": "Program output: benchmarks/reconcile.py. Nothing here is measured: `predicted` is "
        "memplan's plan, `traced` the real libraries under fake tensors on a CPU, both for one A100.",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("memplan", *LIBRARIES)},
        "python": sys.version.split()[0],
        "source": source_hash(),
    }
    done: dict[str, dict[str, Any]] = {}
    if out.exists() and not fresh:
        before = json.loads(out.read_text(encoding="utf-8"))
        if all(before.get(key) == about[key] for key in ("versions", "source")):
            done = {label(result["case"]): result for result in before["results"]}
    todo = [case for case in cases if label(case) not in done]
    print(f"{len(cases)} cases, {len(cases) - len(todo)} known", flush=True)

    def write() -> None:
        results = [done[label(case)] for case in cases if label(case) in done]
        lines = ",\n".join("  " + json.dumps(result, ensure_ascii=False) for result in results)
        head = json.dumps(about, indent=1, ensure_ascii=False)[:-2]
        out.write_text(f'{head},\n "results": [\n{lines}\n ]}}\n', encoding="utf-8")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("memplan.trace")  # before the pool forks, so that all run the same code
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("fork")) as pool:
        futures = {pool.submit(compare, case): case for case in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            done[label(result["case"])] = result
            wrong = sum(not other["agrees"] for other in done.values())
            if not result["agrees"]:
                print(f"\rdeviates: {label(result['case'])}\n  {difference(result)}", flush=True)
            print(f"\r{number}/{len(todo)}, {wrong} deviate", end="", flush=True)
            if number % 10 == 0:
                write()
    print()
    write()
    return [done[label(case)] for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted steps against traced ones.")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="results (default: data/reconciliation.json)"
    )
    parser.add_argument("--only", help="cases with this text in their line")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    arguments = parser.parse_args()

    cases = [case for case in matrix() if not arguments.only or arguments.only in label(case)]
    if arguments.list:
        print("\n".join(map(label, cases)))
        return
    results = run(cases, arguments.out, arguments.jobs, arguments.fresh)
    counts = Counter(
        key
        for result in results
        for key in ("agrees", "static_agrees", "categories_agree", "step_agrees")
        if result.get(key)
    )
    print(f"{len(results)} cases; same peak, phase, operation and layer: {counts['agrees']}")
    print(f"same static bytes by category: {counts['static_agrees']}")
    print(f"same bytes by category at the peak: {counts['categories_agree']}")
    print(f"same allocations all through the step: {counts['step_agrees']}")
    wrong = complaints(results, known_deviations())
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
