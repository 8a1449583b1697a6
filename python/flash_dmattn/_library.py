"""Loads the native library, which registers the operators torch.ops.flash_dmattn.*."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

__all__ = ["find", "load"]

_FILE_NAME = "libflash_dmattn_torch.so"


def find() -> Path | None:
    """The library's file, or None where this installation has none.

    An editable installation keeps it in site-packages, apart from the Python files: the package's search path
    names both places.
    """
    for directory in sys.modules[__package__].__path__:
        path = Path(directory, "lib", _FILE_NAME)
        if path.is_file():
            return path
    return None


@functools.cache
def load() -> None:
    """Registers the operators, once per process.

    Raises ImportError, in one sentence, where the library is missing or does not fit this PyTorch.
    """
    path = find()
    if path is None:
        raise ImportError(
            f"flash_dmattn: {_FILE_NAME} is missing: build it with `pip install --no-build-isolation .` "
            "in the source tree, or use the backends 'flex' and 'reference', which need none"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"flash_dmattn: {path} does not load with PyTorch {torch.__version__} ({error}): "
            "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error
