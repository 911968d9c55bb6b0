"""``memplan stub MODEL FOLDER``: a checkpoint that takes no disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memplan.asked.fields import MAX_LAYERS
from memplan.commands.arguments import Parser, UsageError, add_json, add_model, add_switch, whole

ROWS, LENGTHS = 256, "2048"

EXAMPLES = """\
Safetensors of the right shapes in shards, made of holes: 141 GB of a 70B take
some MB. Of a Hub id it is what the Hub has, of whose weights only the headers
are read; without a network, or of a config.json, what the configuration asks
for, with a tokenizer of a few words, and a processor for a model that takes
pictures; of a folder with a model_index.json, the pipeline of diffusers.
Programs load it as any other checkpoint; its weights are zeros.

examples:
  memplan stub llama-70b ./llama-70b
  memplan dry-run --gpu a6000 -- python train.py --model ./llama-70b
  memplan stub llama-8b ./llama-8b --data rows --lengths lognormal:600,400,4096
"""


def parser() -> Parser:
    """The arguments that ``memplan stub`` takes."""
    result = Parser("stub", "Makes a checkpoint that takes no disk.", "MODEL FOLDER [options]", EXAMPLES)
    add_model(result)
    result.add_argument("folder", metavar="FOLDER", help="where it is made; not there yet, or empty")
    result.add_argument(
        "--layers", type=whole, metavar="N", default=None, help="only so many layers (default: all)"
    )
    add_switch(
        result,
        "--merged",
        "experts as transformers holds them, not one by one: loaded on the host, they take none of it",
    )
    result.add_argument(
        "--data",
        metavar="FOLDER",
        default=None,
        help="write tokenised rows as well, to train.jsonl there",
    )
    result.add_argument(
        "--rows", type=whole, metavar="N", default=None, help=f"how many rows (default: {ROWS})"
    )
    result.add_argument(
        "--lengths",
        metavar="L",
        default=None,
        help=f"their tokens: 2048, 100-1200, or lognormal:MEAN,SD,MAX (default: {LENGTHS})",
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
    from memplan.emulate.rows import MOST, length, write_rows
    from memplan.emulate.stub import stub, stub_pipeline
    from memplan.importers.resolve import hub_id_of, resolve_config
    from memplan.streams import remark

    layers, folder = arguments.layers, Path(arguments.folder)
    if layers is not None and not 0 < layers <= MAX_LAYERS:
        raise UsageError(f"--layers takes a whole number from 1 to {MAX_LAYERS}")
    if arguments.data is None and (arguments.rows is not None or arguments.lengths is not None):
        raise UsageError("--rows and --lengths are of what --data writes: give it a folder")
    rows = ROWS if arguments.rows is None else arguments.rows
    if not 0 < rows <= MOST:
        raise UsageError(f"--rows takes a whole number from 1 to {MOST:,}")
    draw = length(arguments.lengths or LENGTHS)
    if Path(arguments.model, "model_index.json").is_file():
        if layers is not None or arguments.merged or arguments.data is not None:
            raise UsageError("--layers, --merged and --data are of a model, and this is a pipeline")
        stub_pipeline(Path(arguments.model), folder, arguments.python)
        _tell(arguments, None, None)
        return 0
    hub_id = hub_id_of(arguments.model)

    def config() -> dict[str, Any]:
        return _cut(resolve_config(arguments.model).config, layers)

    as_published = hub_id if layers is None and not arguments.merged else None
    if lacking := stub(config, folder, arguments.python, hub_id=as_published, merged=arguments.merged):
        remark(lacking)
    data = None if arguments.data is None else write_rows(Path(arguments.data), rows, draw, folder)
    _tell(arguments, hub_id, data)
    return 0


def _tell(arguments: argparse.Namespace, hub_id: str | None, data: Path | None) -> None:
    """Say what was made, and ``data`` if rows were."""
    from memplan.report.machine import print_answer
    from memplan.streams import say

    folder = str(Path(arguments.folder))
    if arguments.json:
        told = {"model": arguments.model, "hub_id": hub_id, "folder": folder}
        print_answer({**told, "data": None if data is None else str(data)})
        return
    say(f"{folder}: {arguments.model}, a checkpoint of zeros that takes no disk\n")
    if data is not None:
        rows = ROWS if arguments.rows is None else arguments.rows
        say(f"{data}: {rows:,} rows of random tokens\n")


def _cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The configuration with so many layers."""
    if layers is None:
        return config
    text = config.get("text_config")  # of one that sees, too
    if isinstance(text, dict):
        return {**config, "text_config": {**text, "num_hidden_layers": layers}}
    return {**config, "num_hidden_layers": layers}
