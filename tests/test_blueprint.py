"""Parameters, name by name and shape by shape, against the real library on the meta device."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from memplan.importers.registry import registry
from memplan.importers.resolve import resolve
from memplan.predict import blueprint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENTRIES = registry()


def real_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    options = dict(config)
    logging.disable(logging.WARNING)  # transformers comments on published rope settings
    try:
        real = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.device("meta"):
            model = getattr(transformers, config["architectures"][0])(real)
    finally:
        logging.disable(logging.NOTSET)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def registry_config(alias: str) -> dict[str, Any]:
    import json

    from memplan.resources import data_file

    models = json.loads(data_file("model_specs.json").read_text())["models"]
    return next(dict(entry["config"]) for entry in models if entry["alias"] == alias)


def test_there_are_many_models() -> None:
    assert len(ENTRIES) >= 60


@pytest.mark.parametrize("alias", [entry.alias for entry in ENTRIES])
def test_every_parameter_of_the_real_model(alias: str) -> None:
    spec = resolve(alias).spec
    assert blueprint.named_shapes(spec) == real_shapes(registry_config(alias))


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.alias for entry in ENTRIES])
def test_the_published_count(entry: Any) -> None:
    assert blueprint.count_parameters(resolve(entry.alias).spec) == entry.parameters
