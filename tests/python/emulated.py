"""The CUDA kernels, run on the CPU by tests/emulator: the operators of flash_dmattn_emulated take CPU
tensors."""

import functools
import os
from pathlib import Path

import torch

from kernels import OpsKernel

FILE = "libflash_dmattn_torch_emulated.so"


def library() -> Path | None:
    """FLASH_DMATTN_EMULATED_LIBRARY, or where CMake or make put it."""
    build = Path(__file__).parents[2] / "build"
    named = os.environ.get("FLASH_DMATTN_EMULATED_LIBRARY")
    candidates = [Path(named)] if named else [build / FILE, build / "cpp" / FILE]
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def load() -> None:
    path = library()
    if path is None:
        raise FileNotFoundError(
            f"build/{FILE} is missing: configure with -DFLASH_DMATTN_BUILD_TESTING=ON "
            "-DFLASH_DMATTN_BUILD_TORCH=ON and build, or set FLASH_DMATTN_EMULATED_LIBRARY"
        )
    torch.ops.load_library(path)


class EmulatedKernel(OpsKernel):
    largest_work = 100_000_000  # of a case, as narrowing.py counts; takes a few seconds

    @property
    def ops(self):
        load()
        return super().ops
