"""A plan for a machine without cuBLAS. No torch."""

from __future__ import annotations

from dataclasses import replace

from memplan.tape import Tape


def without_workspaces(tape: Tape) -> Tape:
    """A predicted tape without what a CPU does not have: cuBLAS's workspaces, which are always there."""
    sizes = [0 if index in tape.workspaces else size for index, size in enumerate(tape.sizes)]
    changes = [sizes[event] if event >= 0 else -sizes[~event] for event in tape.events]
    return replace(tape, sizes=sizes, deltas=changes)
