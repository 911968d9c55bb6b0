"""bitsandbytes' AdamW with block-wise 8-bit states."""

from memplan.optimizers._bnb import optimizer

OPTIMIZER = optimizer("AdamW", bits=8, paged=False)
