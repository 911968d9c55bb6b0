"""PyTorch's memory snapshots, as ``torch.cuda.memory._dump_snapshot`` writes them: read, written, and made
from a tape.

Such a file is the pickle of a dictionary (torch 2.13: ``_snapshot`` in torch/cuda/memory.py says what is in
it, ``THCPModule_memorySnapshot`` in torch/csrc/cuda/Module.cpp makes it): the segments that the caching
allocator holds, with the blocks in them, and for each device the trace of what it was asked and did.
"""

from memplan.snapshot.reader import load_snapshot
from memplan.snapshot.records import Action, Block, BlockState, Frame, Segment, Snapshot, TraceEntry
from memplan.snapshot.writer import save_snapshot

__all__ = [
    "Action",
    "Block",
    "BlockState",
    "Frame",
    "Segment",
    "Snapshot",
    "TraceEntry",
    "load_snapshot",
    "save_snapshot",
]
