"""bitsandbytes' Lion with block-wise 8-bit states in paged memory."""

from memplan.optimizers._bnb import optimizer

OPTIMIZER = optimizer("Lion", bits=8, paged=True)
