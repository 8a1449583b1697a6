"""Trainable dynamic-mask sparse attention: every query attends to the keys of highest score before it,
exactly."""

from . import nn
from .interface import (
    explain,
    flash_dmattn_func,
    flash_dmattn_func_auto,
    flash_dmattn_varlen_func,
    get_available_backends,
    select_keys,
)

__version__ = "0.1.0"

__all__ = [
    "explain",
    "flash_dmattn_func",
    "flash_dmattn_func_auto",
    "flash_dmattn_varlen_func",
    "get_available_backends",
    "nn",
    "select_keys",
]
