"""Asks of every model type that the installed transformers knows who answers for it.

    python benchmarks/architectures.py [--jobs N]              writes data/architectures.json
    python benchmarks/architectures.py [--merge] TYPE ...      some of them; writes nothing, or with --merge
                                                               their rows in the places of the old ones

A causal language model without a predicted plan is traced in each mode, with a recipe's other options as they
are by default: as its configuration class makes it, with few layers and 16 tokens. What is no causal
language model can't be traced. A reason is what the tracer says, in its own words.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import warnings
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from memplan import families
from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError

RESULTS = Path(__file__).resolve().parent.parent / "data" / "architectures.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
MODES = ("full", "lora", "qlora")
SECONDS = 240  # of one mode; what takes longer goes token by token in Python
# What configuration classes call the number of layers.
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_blocks", "num_hidden_groups", "num_encoder_layers", "num_decoder_layers", "depth", "n_head_layers",
)  # fmt: skip
_FOLDER = re.compile(r"/\S*/site-packages/")  # where the libraries lie here
_NONE = "no causal language model of transformers"


class _TooLongError(BaseException):  # no Exception: what the libraries catch does not hold it up
    pass


def types() -> list[str]:
    """Every model type of the installed transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def _reduced(kind: Any, layers: int) -> dict[str, Any]:
    """Arguments of a configuration class that leave few layers in it and in its parts."""
    made = kind()
    found: dict[str, Any] = {name: layers for name in _COUNTS if isinstance(getattr(made, name, None), int)}
    for name, part in kind.sub_configs.items():
        if hasattr(part, "sub_configs") and part is not kind and getattr(made, name, None) is not None:
            found[name] = {**_reduced(type(getattr(made, name)), layers)}
            if part.model_type == "":  # any model, chosen by its type
                found[name]["model_type"] = getattr(made, name).model_type
    return found


def _configuration(model_type: str) -> dict[str, Any]:
    """A config.json of few layers; with as many as the class has by default, if it can't have fewer."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    for layers in (2, 4, 6, 8):
        config = {"model_type": model_type, **_reduced(kind, layers)}
        with suppress(Exception):  # whatever a class says of a number of layers that it does not take
            kind(**{name: value for name, value in config.items() if name != "model_type"})
            return config
    return {"model_type": model_type}


def answer(model_type: str) -> dict[str, Any]:
    """A model type's row: who answers, or for each mode whether its step can be traced, and why not."""
    row: dict[str, Any] = {"model_type": model_type}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

        from memplan.trace import quiet, trace

        kind = CONFIG_MAPPING[model_type]
        row["sees"] = kind in AutoModelForImageTextToText._model_mapping
        if model_type in families.names():
            return {**row, "predicted": True}
        if kind not in AutoModelForCausalLM._model_mapping:
            return {**row, "why": _NONE}
        with quiet():
            config = _configuration(model_type)
        for mode in MODES:
            signal.signal(signal.SIGALRM, _stop)
            signal.alarm(SECONDS)
            try:
                trace(json.loads(json.dumps(config)), Recipe(trainer="peft", mode=mode, seq_len=16))
                row[mode] = "traced"
            except MemplanError as error:
                row[mode] = _FOLDER.sub("", " ".join(str(error).split()))
            except _TooLongError:
                row[mode] = f"takes more than {SECONDS} seconds"
            finally:
                signal.alarm(0)
    return row


def _stop(number: int, frame: Any) -> None:
    raise _TooLongError


def main() -> None:
    parser = argparse.ArgumentParser(description="Who answers for each model type of transformers.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these; writes nothing")
    parser.add_argument("--merge", action="store_true", help="put their rows in the places of the old ones")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    known = types()
    asked = arguments.types or known
    rows: dict[str, dict[str, Any]] = {}
    if arguments.merge:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))["types"]
        rows = {row["model_type"]: row for row in before}
    # a few types each: what a library's module leaves behind adds up
    with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) as pool:
        for number, row in enumerate(pool.imap_unordered(answer, asked), start=1):
            rows[row["model_type"]] = row
            print(f"{number}/{len(asked)} {json.dumps(row)}", flush=True)
    if arguments.types and not arguments.merge:
        return
    about = {
        "about": "Program output: benchmarks/architectures.py. Every model type of transformers: whether a "
        "plan is predicted, or its step traced, in each mode; else the tracer's own words.",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    lines = ",\n".join("  " + json.dumps(rows[name], ensure_ascii=False) for name in known)
    head = json.dumps(about, indent=1)[:-2]
    RESULTS.write_text(f'{head},\n "types": [\n{lines}\n ]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
