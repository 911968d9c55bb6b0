"""Fuzzing: many odd inputs, and what memplan must do with each of them.

``python -m tests.fuzz --inputs 20000 --seed 1`` runs all fuzzers and prints a table. A fuzzer is a module
with

- ``SHARE``: which part of the inputs is its own,
- ``make(random)``: an input, a plain value that follows from the random numbers alone,
- ``check(value)``: gives the value to memplan as a user would, in an empty folder. It returns for an answer
  that makes sense, lets a MemplanError through, which is a refusal, and raises :class:`harness.Fault` for an
  answer that is nonsense.

:mod:`harness` holds every input to the rest: a refusal is one sentence, no other exception gets out, nothing
takes more than ten seconds or a GiB, nothing is run, opened for writing or left behind elsewhere.
"""

import sys
from pathlib import Path

# The tests' helpers beside this folder are top-level modules, as pytest has them.
sys.path.insert(0, str(Path(__file__).parents[1]))
