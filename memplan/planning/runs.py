"""Runs of one recipe on a card, of many batch sizes and lengths, each simulated as a single one is."""

from __future__ import annotations

from functools import partial

from memplan.asked.alloc_conf import parse_settings
from memplan.asked.gpus import Gpu
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.device import fit
from memplan.device.fit import Run, allowed_bytes, beyond
from memplan.device.rerun import Rerun, can_rerun
from memplan.planning import predicted
from memplan.planning.long_tapes import LongTapes, Resized
from memplan.predict.loading import loading
from memplan.tape import Tape

_KNOWN = 4  # runs that are kept written down


class Runs:
    """Runs of a recipe (resolved); ``card`` where other kernels run than on the reference card."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, gpu: Gpu, card: Card | None) -> None:
        self.spec, self.recipe, self.gpu, self.card = spec, recipe, gpu, card
        self._settings = parse_settings(recipe.alloc_conf)
        self._tapes = LongTapes(spec, recipe, card)
        self._alone: Run | None = None  # the last run of several GPUs
        self._reruns: list[tuple[Tape, Rerun]] = []  # by whose events they are, the last one first

    def step(self, batch_size: int, seq_len: int) -> Resized:
        """A step, for :meth:`excess`."""
        if self.recipe.parallel is not None:  # streams, buckets of a step, other first ones
            asked = self.recipe.model_copy(update={"batch_size": batch_size, "seq_len": seq_len})
            self._alone = predicted.run(self.spec, asked, self.card)
            return Resized(self._alone.tape, [], self._alone.tape.sizes)
        return self._tapes.of(batch_size, seq_len)

    def excess(self, step: Resized) -> int:
        """What :func:`memplan.device.fit.excess` says of the run that it is a step of."""
        if self._alone is not None and self._alone.tape is step.long:
            return fit.excess(self.gpu, self._alone)
        if not can_rerun(self._settings):
            tape = step.tape
            load = partial(loading, self.spec, self.recipe, tape)
            run = Run(tape, load, self._settings, self.card, self.recipe.gpus)
            return fit.excess(self.gpu, run)
        allowed = allowed_bytes(self.gpu, self.card or Card(), self._settings, self.recipe.gpus)
        over = 0
        for reserved in self._rerun_of(step).play(step.sizes):
            over = beyond(reserved, allowed)
            if over > 0:
                break
        return over

    def _rerun_of(self, step: Resized) -> Rerun:
        for long, known in self._reruns:
            if long is step.long and known.suits(step.sizes):
                return known
        tape = step.tape
        rerun = Rerun(tape, step.kinds, loading(self.spec, self.recipe, tape), self._settings)
        self._reruns = [(step.long, rerun), *self._reruns[: _KNOWN - 1]]
        return rerun
