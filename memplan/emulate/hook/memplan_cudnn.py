"""cuDNN is emulated for convolutions, which take its ways; what else PyTorch asks of it goes without."""

from __future__ import annotations

from functools import wraps
from typing import Any


def start(torch: Any) -> None:
    """From now on."""

    def without(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.backends.cudnn.flags(enabled=False):
                return function(*args, **kwargs)

        return call

    torch.backends.cuda.enable_cudnn_sdp(False)  # attention, which Hopper takes first
    torch.backends.cudnn.is_acceptable = lambda _: False  # recurrent layers ask
    for place, names in (
        (torch._VF, ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        (torch, ("batch_norm", "ctc_loss", "grid_sampler", "affine_grid_generator")),
    ):
        for name in names:
            setattr(place, name, without(getattr(place, name)))
