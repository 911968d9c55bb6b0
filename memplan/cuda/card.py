"""What kernels look up about the card when they decide what to allocate.

A plan is made for the reference card, an A100 (compute capability 8.0), unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

# Streaming multiprocessors of one card of each compute capability: V100, T4, A100, RTX A6000, RTX 4090,
# H100 SXM, B200, RTX PRO 6000. NVIDIA's architecture white papers.
_MULTIPROCESSORS = {
    (7, 0): 80, (7, 5): 40, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 188,
}  # fmt: skip

# FlashAttention wants Ampere or newer (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
FLASH_CAPABILITY = (8, 0)

# memplan's own kernels too, for bf16.
KERNELS_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Card:
    """A GPU as far as stand-ins ask."""

    capability: tuple[int, int] = (8, 0)
    cudnn_attention: bool = True  # torch.backends.cuda.enable_cudnn_sdp

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors; a card we have no number for counts as an A100."""
        return _MULTIPROCESSORS.get(self.capability, 108)

    @property
    def threads(self) -> int:
        """Threads that a multiprocessor runs at most (CUDA programming guide, table of compute
        capabilities)."""
        return {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536}.get(
            self.capability, 2048
        )

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a block may opt in to (CUDA programming guide, table of compute
        capabilities)."""
        known = {(7, 0): 98_304, (7, 5): 65_536, (8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}
        return known.get(self.capability, 101_376)

    @property
    def cublas_workspace(self) -> int:
        """Bytes of one cuBLAS workspace: ``:4096:2:16:8``, or 32 MiB from Hopper on
        (aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``). cuBLASLt shares it
        (``TORCH_CUBLASLT_UNIFIED_WORKSPACE``, on by default; torch/backends/cuda/__init__.py, 2.13)."""
        return 33_554_432 if self.capability[0] in (9, 10) else 8_519_680
