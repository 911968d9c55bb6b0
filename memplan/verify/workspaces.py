"""A plan for a machine without cuBLAS. No torch."""

from __future__ import annotations

from memplan.tape import Category, Tape


def without_workspaces(tape: Tape) -> Tape:
    """A predicted tape without what a CPU does not have: cuBLAS's workspaces, which are always there."""
    result = Tape(
        provenance=tape.provenance,
        events=list(tape.events),
        sizes=list(tape.sizes),
        categories=tape.categories,
        operations=tape.operations,
        modules=tape.modules,
        products=tape.products,
        segments=tape.segments,
    )
    for index, operation in enumerate(tape.operations):
        if operation == "cublas_workspace" and tape.categories[index] is Category.TEMPORARIES:
            result.sizes[index] = 0
    result.deltas = [result.sizes[event] if event >= 0 else -result.sizes[~event] for event in result.events]
    return result
