"""``memplan stub MODEL FOLDER``: a checkpoint that takes no disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memplan.asked.fields import MAX_LAYERS
from memplan.commands.arguments import Parser, UsageError, add_json, add_model, whole

EXAMPLES = """\
config.json as published, safetensors of the right shapes in shards, made of
holes: 141 GB of a 70B take some KB. A tokenizer of a few words is made, too,
and a processor for a model that takes pictures. Programs load it as any other
checkpoint; its weights are zeros.

examples:
  memplan stub llama-70b ./llama-70b
  memplan dry-run --gpu a6000 -- python train.py --model ./llama-70b
"""


def parser() -> Parser:
    """The arguments that ``memplan stub`` takes."""
    result = Parser("stub", "Makes a checkpoint that takes no disk.", "MODEL FOLDER [options]", EXAMPLES)
    add_model(result)
    result.add_argument("folder", metavar="FOLDER", help="where it is made; not there yet, or empty")
    result.add_argument(
        "--layers", type=whole, metavar="N", default=None, help="only so many layers (default: all)"
    )
    result.add_argument(
        "--merged",
        action="store_true",
        default=False,
        help="experts as transformers holds them, not one by one: loaded on the host, they take none of it",
    )
    result.add_argument(
        "--python",
        metavar="PYTHON",
        default=None,
        help="one that has torch and transformers (default: memplan's own, or python)",
    )
    add_json(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Make it; 0."""
    from memplan.emulate.stub import stub
    from memplan.importers.resolve import hub_id_of, resolve_config
    from memplan.streams import remark

    layers, folder = arguments.layers, Path(arguments.folder)
    if layers is not None and not 0 < layers <= MAX_LAYERS:
        raise UsageError(f"--layers takes a whole number from 1 to {MAX_LAYERS}")
    hub_id = hub_id_of(arguments.model)

    def config() -> dict[str, Any]:
        return _cut(resolve_config(arguments.model).config, layers)

    as_published = hub_id if layers is None and not arguments.merged else None
    if lacking := stub(config, folder, arguments.python, hub_id=as_published, merged=arguments.merged):
        remark(lacking)
    if arguments.json:
        from memplan.report.machine import print_json

        print_json({"model": arguments.model, "hub_id": hub_id, "folder": str(folder)})
    else:
        from memplan.streams import say

        say(f"{folder}: {arguments.model}, a checkpoint of zeros that takes no disk\n")
    return 0


def _cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The configuration with so many layers."""
    if layers is None:
        return config
    text = config.get("text_config")  # of one that sees, too
    if isinstance(text, dict):
        return {**config, "text_config": {**text, "num_hidden_layers": layers}}
    return {**config, "num_hidden_layers": layers}
