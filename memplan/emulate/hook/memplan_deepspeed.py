"""DeepSpeed's engine steps PyTorch's optimizer while it is made, to have its states, and then once for each
part of the parameters in what is one step of training: the engine's steps are what counts.
"""

from __future__ import annotations

from functools import wraps
from typing import Any


def prepare(watch: Any, engine: Any) -> None:
    """Count the steps of deepspeed.runtime.engine's engines."""
    kind = engine.DeepSpeedEngine
    make, take = kind.__init__, kind._take_model_step

    @wraps(make)
    def making(made: Any, *args: Any, **kwargs: Any) -> None:
        with watch.inside():
            make(made, *args, **kwargs)

    @wraps(take)
    def taking(self: Any, *args: Any, **kwargs: Any) -> None:
        with watch.inside():
            take(self, *args, **kwargs)
        watch.stepped(self.basic_optimizer)

    kind.__init__, kind._take_model_step = making, taking
