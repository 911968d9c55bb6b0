"""Where a step is, as segments of the tape: embedding, decoder layers, head."""

from __future__ import annotations

from memplan.tape import Phase
from memplan.tape.modules import layer_of
from memplan.trace.follower import Follower


class Segments:
    """Opens a segment whenever the step enters or leaves a decoder layer."""

    def __init__(self, recorder: Follower) -> None:
        self.recorder = recorder

    def __call__(self, module: str) -> None:
        recorder = self.recorder
        if recorder.phase not in (Phase.FORWARD, Phase.BACKWARD):
            return
        layer = layer_of(module)
        here = recorder.tape.segments[-1]
        if layer == here.layer:
            return
        if layer is not None:
            recorder.begin(recorder.phase, "layers", layer)
        elif module.endswith(("embed_tokens", "wte", "embed_in")):
            recorder.begin(recorder.phase, "embedding")
        elif recorder.phase is Phase.FORWARD and not module.endswith((".norm", "lm_head")):
            return  # between two layers
        else:
            recorder.begin(recorder.phase, "head")
