"""bitsandbytes' AdamW with 32-bit states in paged memory."""

from memplan.optimizers._bnb import optimizer

OPTIMIZER = optimizer("AdamW", bits=32, paged=True)
