"""An evaluation in the middle of training, as transformers' Trainer makes one: what it takes at its highest.

Sources: transformers 5.23 trainer.py, ``evaluation_loop`` and ``prediction_step`` with only the loss asked
for (no ``compute_metrics``, which would keep the logits of every batch besides): a forward pass of
``per_device_eval_batch_size`` sequences without gradients. Nothing is kept for a backward pass, checkpointing
and dropout are off, and the Trainer has turned the cache of keys and values off
(``TrainingArguments.use_cache``). What is left is mostly the logits of the whole batch: as the head makes
them, in fp32 (``ForCausalLMLoss``), and their log-softmax. Weights, adapters and optimizer states rest;
gradients are gone.
"""

from __future__ import annotations

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.predict.fed import Rows, batch, waiting, whole
from memplan.predict.fold import Played
from memplan.predict.step import at_rest, forward, written
from memplan.predict.unlike import Standing
from memplan.shadow.tensor import no_grad, state
from memplan.shadow.turns import in_part
from memplan.tape import Phase, Tape

_DROPOUTS = ("attention_dropout", "resid_dropout", "residual_dropout")


def write_evaluation(
    spec: ModelSpec, recipe: Recipe, batch_size: int, *, card: Card | None = None, folded: bool = True
) -> Tape:
    """The tape of an evaluation of ``batch_size`` sequences, each as long as those that ``recipe`` (resolved)
    trains on, between two steps of it; ``folded`` as :func:`memplan.predict.step.write_tape` has it, else as
    ``write_long_tape``."""
    spec = spec.model_copy(update=dict.fromkeys(_DROPOUTS, 0.0))
    evaluated = recipe.model_copy(
        update={"gradient_checkpointing": False, "lora_dropout": 0.0, "batch_size": batch_size}
    )
    rows = whole(recipe), whole(evaluated)
    return written(
        lambda played: _play(spec, evaluated, rows, card, played),
        spec,
        rows[1].recipe,
        folded=True,
        unfolded=not folded,
    )


@in_part
def _play(
    spec: ModelSpec, recipe: Recipe, rows: tuple[Rows, Rows], card: Card | None, played: Played | Standing
) -> Tape:
    model, _states, _workspaces, loop = at_rest(spec, recipe, card, played, looped=True)
    tape = state.tape
    trained, evaluated = rows
    trained_on = batch(spec, trained)  # the training loop's names for them go on
    _others = waiting(trained_on, recipe.gradient_accumulation_steps - 1)
    tape.begin(Phase.FORWARD, "batch")
    assert loop is not None
    fed = batch(spec, evaluated, loop.items)
    with no_grad():
        loss = forward(model, fed, list(played.indices))
    tape.begin(Phase.FORWARD, "end")
    del loss
    tape.finish()  # what dies with these names is no part of it
    return tape
