"""DeepSpeed's ZeRO-2: gradients, masters and optimizer states are partitioned."""

from __future__ import annotations

from functools import partial

from memplan.strategies import Strategy
from memplan.strategies._zero12 import Zero12, load

STRATEGY = Strategy(partial(Zero12, gradients=True), load=load, folds=False, copies=True, itemsize=2)
