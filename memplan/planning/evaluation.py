"""What an evaluation between two steps takes: the Trainer makes it in batches of 8 unless told otherwise."""

from __future__ import annotations

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.device.fit import Run
from memplan.planning.records import Evaluation

DEFAULT_BATCH = 8  # TrainingArguments.per_device_eval_batch_size (transformers 5.23)


def evaluation(spec: ModelSpec, recipe: Recipe) -> Evaluation:
    """The evaluation of a resolved recipe, on the reference card."""
    from memplan.predict.evaluation import write_evaluation
    from memplan.tape import replay

    peak, one = (replay(write_evaluation(spec, recipe, size)) for size in (DEFAULT_BATCH, 1))
    return Evaluation(
        batch_size=DEFAULT_BATCH,
        tensor_bytes=peak.allocated_bytes,
        operation=peak.operation,
        module=peak.module,
        with_one_bytes=one.allocated_bytes,
    )


def with_evaluation(run: Run, spec: ModelSpec, recipe: Recipe) -> Run:
    """The run with such an evaluation after its steps, on the card that it is written for."""
    from memplan.predict.evaluation import write_evaluation

    tape = write_evaluation(spec, recipe, DEFAULT_BATCH, card=run.card, folded=False)
    return Run(run.tape, run.loading, run.settings, run.card, tape)
