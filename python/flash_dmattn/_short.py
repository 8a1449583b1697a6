"""The short way to the operators, for calls that they take as they are.

Eager calls of the common forms (one backend asked for by nobody, key-only bias, nothing to convert or to
expand) reach the operators in a few microseconds. The operators check everything again; a call that they
refuse, like one of another form, goes the long way through _arguments.py and _backends.py. That makes the
same two calls, and raises errors in the user's words.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._backends import DEVICES, ENVIRONMENT_VARIABLE
from ._ops import native

__all__ = ["attend"]

# os.environ raises and catches two exceptions to say that it has no such variable, which takes most of a
# microsecond; what it wraps says so at once.
if hasattr(os.environ, "_data") and hasattr(os.environ, "encodekey"):
    _environment, _variable = os.environ._data, os.environ.encodekey(ENVIRONMENT_VARIABLE)
else:
    _environment, _variable = os.environ, ENVIRONMENT_VARIABLE

_select, _forward = (native.select.default, native.forward.default) if DEVICES else (None, None)


def attend(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    scale: Any,
    is_causal: Any,
    keep_window_size: Any,
    score: Any,
    expiry: Any,
) -> tuple[Tensor, Tensor] | None:
    """out and lse as flash_dmattn_func computes them without a mask, or None: take the long way."""
    if (
        torch.compiler.is_compiling()
        or not (type(query) is type(key) is type(value) is Tensor)
        or not ((query.is_cuda and "cuda" in DEVICES) or (query.is_cpu and "cpu" in DEVICES))
        or torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu")
        or _variable in _environment
        or type(is_causal) is not bool
        or forward_ad._current_level >= 0
    ):
        return None
    # Where one tensor is a meta tensor, PyTorch runs the fake kernel.
    if key.is_meta or value.is_meta or not (_is_real(bias) and _is_real(score) and _is_real(expiry)):
        return None
    if bias is not None and not (
        bias.dtype is torch.float32
        and bias.dim() == 3
        and bias.size(0) == query.size(0)
        and bias.size(1) == key.size(-2)
    ):
        return None
    if keep_window_size is not None:
        if type(keep_window_size) is not int or expiry is not None or (bias is None) == (score is None):
            return None
    elif score is not None:
        return None
    if scale is not None and type(scale) is not float:
        return None
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    arguments = (query, key, value, bias, scale, is_causal, keep_window_size, score, expiry)
    try:
        if needs_grad:
            out, lse = _call(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # spares what prepares for a backward
                out, lse = _call(*arguments)
    except (RuntimeError, ZeroDivisionError):  # the latter of a head dim of 0
        return None
    return out, lse


def _is_real(tensor: Any) -> bool:
    return tensor is None or (isinstance(tensor, Tensor) and not tensor.is_meta)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    keep_window_size: int | None,
    score: Tensor | None,
    expiry: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if keep_window_size is not None:
        score = bias if score is None else score
        if score.requires_grad:
            score = score.detach()
        num_queries = query.size(1) if is_causal else -1
        expiry = _select(score, keep_window_size, is_causal, 0, 0, None, num_queries)
    if scale is None:
        scale = query.size(-1) ** -0.5
    window = keep_window_size or 0
    return _forward(query, key, value, bias, None, expiry, score, None, None, None, window, scale, is_causal)
