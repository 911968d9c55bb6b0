"""Does a peak fit on a card? An estimate until the caching allocator is simulated.

needed = peak of allocated bytes + slack of the caching allocator + CUDA context, against what PyTorch
can see of the card.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from memplan.card import Card
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


def judge(card: Gpu, peak_bytes: int, static_bytes: int, *, written_for: Card | None = None) -> Fit:
    """Hold a peak of allocated bytes, of which ``static_bytes`` are there all the time, against a card.
    The step was ``written_for`` a card whose two cuBLAS workspaces may be smaller."""
    workspaces = 0
    if card.capability is not None:
        ours, theirs = Card(card.capability), written_for or Card()
        workspaces = 2 * (ours.cublas_workspace - theirs.cublas_workspace)
    least = peak_bytes + CONTEXT_BYTES + workspaces
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
