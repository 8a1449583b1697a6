"""`import flash_dma_cuda` succeeds if, and only if, flash_dmattn is built with its CUDA kernels.

The name by which installations of the original implementation are checked. It works without a GPU.
"""

from flash_dmattn._backends import why_no_kernels

if reason := why_no_kernels("cuda"):
    raise ImportError(f"flash_dma_cuda: {reason}")
