"""Check data/model_specs.json against transformers.

Every entry's config is built as the real model class on the meta device (no weights, no memory);
the number of distinct parameters, tied ones counted once, must equal the entry's "parameters".

    python benchmarks/check_registry.py [ALIAS ...]

Needs torch and transformers. Exits 1 if any entry disagrees or a name is used twice.
"""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

SPECS = Path(__file__).resolve().parent.parent / "data" / "model_specs.json"


def count_parameters(config: dict[str, Any]) -> tuple[str, int]:
    """The class transformers picks for this config, and its number of distinct parameters."""
    fields = dict(config)
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    sees = type(hf_config) not in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(hf_config)
    # parameters() yields a tied parameter once
    return type(model).__name__, sum(p.numel() for p in model.parameters())


def check_names(models: list[dict[str, Any]]) -> list[str]:
    """Problems with the aliases: a name used twice, or not lowercase-with-dashes."""
    names = [name for m in models for name in [m["alias"], *m["aliases"]]]
    problems = [f"{name}: used {n} times" for name, n in Counter(names).items() if n > 1]
    problems += [f"{n}: not lowercase with dashes" for n in names if n != n.lower() or " " in n or "_" in n]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("alias", nargs="*", help="check only these entries")
    only = set(parser.parse_args().alias)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    models = json.loads(SPECS.read_text())["models"]
    problems = check_names(models)
    unknown = only - {name for m in models for name in [m["alias"], *m["aliases"]]}
    problems += [f"{name}: no such entry" for name in sorted(unknown)]
    checked = 0
    for spec in models:
        if only and not only & {spec["alias"], *spec["aliases"]}:
            continue
        checked += 1
        try:
            built, counted = count_parameters(spec["config"])
        except Exception as error:  # a config that transformers refuses is a finding, not a crash
            problems.append(f"{spec['alias']}: {type(error).__name__}: {error}")
            continue
        wrong = []
        if counted != spec["parameters"]:
            wrong.append(
                f"{counted:,} counted, {spec['parameters']:,} published ({counted - spec['parameters']:+,})"
            )
        if [built] != spec["config"]["architectures"]:
            wrong.append(f"built {built}, config says {spec['config']['architectures']}")
        problems += [f"{spec['alias']}: {w}" for w in wrong]
        print(f"{'BAD' if wrong else 'ok':4}{spec['alias']:32}{counted:>18,}  {built}")
    print(f"{checked} entries checked, {len(problems)} problems")
    for problem in problems:
        print("  " + problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
