"""Does a peak fit on a card? An estimate until the caching allocator is simulated.

needed = peak of allocated bytes + slack of the caching allocator + CUDA context, against what PyTorch
can see of the card.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from memplan.gpu import Gpu

MIB = 1 << 20

# What a process takes outside PyTorch's allocator: driver context, cuBLAS and kernel images. Assumed: not
# measured by us yet.
CONTEXT_BYTES = 600 * MIB

# What the caching allocator reserves beyond the allocated peak, as a share of the bytes that come and go in
# a step (static tensors are allocated once and leave no holes). Stated, not fitted: on the published A100
# runs that come near the card's size (fms-acceleration, Mistral-7B NF4 at 32 x 4096 tokens) the driver's
# figure exceeds the allocated peak by 10 % of those bytes, the context included.
SLACK_SHARE = 10  # per cent

# cuBLAS workspaces are twice 8.125 MiB in the plan, and twice 32 MiB on Hopper
# (aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize).
_HOPPER_EXTRA = 2 * (33_554_432 - 8_519_680)


class Fit(BaseModel):
    """One card. ``needed_bytes`` is an estimate; ``total_bytes`` is what PyTorch can see of the card;
    ``headroom_bytes`` is their difference.

    Verdicts: *fits* if needed <= total; *tight* if the allocated peak and the context fit, but not all of
    the assumed slack; else *does not fit*.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    total_bytes: int
    needed_bytes: int
    headroom_bytes: int
    verdict: Literal["fits", "tight", "does not fit"]


def judge(card: Gpu, peak_bytes: int, static_bytes: int) -> Fit:
    """Hold a peak of allocated bytes, of which ``static_bytes`` are there all the time, against a card."""
    hopper = card.vendor == "nvidia" and card.compute_capability.startswith("9.")
    least = peak_bytes + CONTEXT_BYTES + (_HOPPER_EXTRA if hopper else 0)
    needed = least + (peak_bytes - static_bytes) * SLACK_SHARE // 100
    total = card.visible_bytes
    verdict: Literal["fits", "tight", "does not fit"] = (
        "fits" if needed <= total else "tight" if least <= total else "does not fit"
    )
    return Fit(
        gpu=card.name,
        total_bytes=total,
        needed_bytes=needed,
        headroom_bytes=total - needed,
        verdict=verdict,
    )
