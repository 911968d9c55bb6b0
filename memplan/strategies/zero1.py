"""DeepSpeed's ZeRO-1: masters and optimizer states are partitioned; the last pass reduces gradients."""

from __future__ import annotations

from functools import partial

from memplan.strategies import Strategy
from memplan.strategies._zero12 import Zero12, load

STRATEGY = Strategy(partial(Zero12, gradients=False), load=load, folds=False, copies=True, itemsize=2)
