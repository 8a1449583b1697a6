"""The public functions. What they compute is defined in docs/math.md and, executable, in reference.py.

Shapes: B batch, Sq and Sk the lengths of queries and keys, H query heads, Hkv key/value heads (H % Hkv == 0),
D the head dim. Query row i stands at position i + Sk - Sq: the last query is at the last key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _backends, _short
from ._arguments import packed_problem, padded_problem, select_problem

__all__ = [
    "explain",
    "flash_dmattn_func",
    "flash_dmattn_func_auto",
    "flash_dmattn_varlen_func",
    "get_available_backends",
    "select_keys",
]


def flash_dmattn_func(
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    keep_window_size: int | None = None,
    attn_score: Tensor | None = None,
    expiry: Tensor | None = None,
    return_lse: bool = False,
    validate: bool = False,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query sees the keep_window_size keys of highest score before it.

        logit(i, j) = scale * <query_i, key_j> + attn_bias[b, g, j]       over the keys that row i sees
        out_i = sum_j softmax(logit(i, :))_j value_j;    lse_i = log sum_j exp(logit(i, j))

    Of equal scores the later key ranks higher; scores of -inf and NaN, a key-only bias of -inf and a key-only
    mask disable a key: nobody sees it and it takes no place in the window. A row that sees no key gets out 0,
    lse -inf and gradients 0. Without keep_window_size and expiry this is plain attention.

    Args:
        query: [B, Sq, H, D], float64, float32, bfloat16 or float16 (alias q).
        key, value: [B, Sk, Hkv, D], of query's dtype (aliases k, v). Query head h reads head h // (H // Hkv).
        attn_mask: bool (True = visible) or 0 and 1 of any dtype. Key-only, at no cost: [B, Sk], [B, Hkv, Sk]
            or [B, Hkv, 1, Sk]. Per query, at the memory and time of a dense mask: [B, H or Hkv, Sq, Sk]. B,
            heads and Sq may be 1.
        attn_bias: added to the logits; differentiable. Key-only: [B, Hkv, Sk] or [B, Hkv, 1, Sk]. Per query:
            [B, H or Hkv, Sq, Sk]. B, heads and Sq may be 1.
        scale: factor of <query, key>; default D ** -0.5.
        is_causal: key j is visible to position p only if j <= p; needs Sq <= Sk.
        keep_window_size: keys kept per query, at least 1. Not causal: the same keys for all queries.
        attn_score: what ranks the keys, [B, Hkv, Sk]; default: the key-only attn_bias. It has no gradient.
        expiry: int32 [B, Hkv, Sk], a selection in place of keep_window_size, see select_keys. Key j is
            visible to the positions j <= p < expiry[b, g, j]; not causal: to all if expiry[b, g, j] >= Sk,
            else to none.
        return_lse: return (out, lse). lse is differentiable.
        validate: check the values in attn_mask and expiry as well, which waits for the device. On the CPU
            whatever is cheap to check is checked always.

    Returns:
        out, like query and contiguous; with return_lse also lse [B, H, Sq], natural log, float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is accepted.
        NotImplementedError: no backend, or not the one asked for, takes the call; lists the reasons.
        ImportError: the native library is not built.

    The method is that of Shi et al. 2025, "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124.
    """
    if attn_mask is None and validate is False and q is k is v is None and type(return_lse) is bool:
        result = _short.attend(
            query, key, value, attn_bias, scale, is_causal, keep_window_size, attn_score, expiry
        )
        if result is not None:
            return result if return_lse else result[0]
    return _flash_dmattn_func(
        None, query, key, value, attn_mask, attn_bias, scale, is_causal,
        keep_window_size=keep_window_size, attn_score=attn_score, expiry=expiry,
        return_lse=return_lse, validate=validate, q=q, k=k, v=v,
    )  # fmt: skip


def _flash_dmattn_func(
    backend: str | None,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    attn_mask: Any = None,
    attn_bias: Any = None,
    scale: Any = None,
    is_causal: Any = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    problem = padded_problem(
        "flash_dmattn_func", query, key, value, attn_mask, attn_bias, scale, is_causal, **options
    )
    out, lse = _backends.attend(problem, backend)
    return (out, lse) if problem.return_lse else out


def flash_dmattn_varlen_func(
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    keep_window_size: int | None = None,
    attn_score: Tensor | None = None,
    expiry: Tensor | None = None,
    return_lse: bool = False,
    validate: bool = False,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_dmattn_func for sequences of different lengths, packed one after the other without padding.

    Every sequence is a problem of its own: it selects on its own and counts positions from its own start.

    Args:
        query: [total_q, H, D]; key, value: [total_k, Hkv, D].
        attn_mask: key-only, [total_k] or [total_k, Hkv].
        attn_bias, attn_score, expiry: [total_k, Hkv].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], starting at 0 and ending at total_q, total_k:
            sequence s owns the rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] and the keys cu_seqlens_k[s] to
            cu_seqlens_k[s + 1]. Causal: no sequence has more queries than keys. Their values are checked on
            the
            CPU, elsewhere with validate=True; wrong ones are safe but give unspecified results.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequence lengths, checked where cu_seqlens are. No
            result depends on them.
        Everything else as in flash_dmattn_func.

    Returns:
        out, like query and contiguous; with return_lse also lse [H, total_q].
    """
    problem = packed_problem(
        "flash_dmattn_varlen_func", query, key, value, attn_mask, attn_bias,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, is_causal,
        keep_window_size=keep_window_size, attn_score=attn_score, expiry=expiry,
        return_lse=return_lse, validate=validate, q=q, k=k, v=v,
    )  # fmt: skip
    out, lse = _backends.attend(problem, None)
    return (out, lse) if return_lse else out


def flash_dmattn_func_auto(backend: str | None = None) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """flash_dmattn_func bound to one backend: "cuda", "cpu", "flex" or "reference"; None leaves the choice
    open.

    The environment variable FLASH_DMATTN_BACKEND asks for a backend in every call that names none.
    """
    if backend is not None:
        _backends.check_name("flash_dmattn_func_auto", "backend", backend)
    if backend is None:
        function = functools.partial(flash_dmattn_func)
    else:
        function = functools.partial(_flash_dmattn_func, backend)
    return functools.update_wrapper(function, flash_dmattn_func)


def get_available_backends() -> list[str]:
    """The backends that can serve calls in this process, in the order in which they are tried."""
    return _backends.available()


def select_keys(
    attn_score: Tensor,
    keep_window_size: int,
    is_causal: bool = True,
    num_sinks: int = 0,
    local_window: int = 0,
    *,
    cu_seqlens: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """The selection of flash_dmattn_func as data: the first position that no longer sees each key.

    Key j is visible exactly to the positions j <= p < expiry[b, g, j]: j stands for "never visible", Sk for
    "never evicted". Not causal: Sk if selected, j if not. Inspect it, draw it, edit it, pass it on as
    expiry=.

    Args:
        attn_score: [B, Hkv, Sk], float64, float32, bfloat16 or float16; -inf and NaN disable a key.
        keep_window_size: keys kept per query, at least 1.
        num_sinks: the first num_sinks keys stay visible for ever, on top of the window.
        local_window: every key is visible to this many positions at least, its own included, on top of the
            window; causal only. Neither makes a disabled key visible.
        cu_seqlens: int32 [sequences + 1], for packed sequences: attn_score is then [total_k, Hkv], every
            sequence selects on its own and positions count from its start.
        validate: check the values of cu_seqlens where that waits for the device, too.

    Returns:
        expiry, int32, shaped like attn_score, contiguous.
    """
    problem = select_problem(
        "select_keys", attn_score, keep_window_size, is_causal, num_sinks, local_window, cu_seqlens, validate
    )
    return _backends.select(problem)


def explain(*args: Any, backend: str | None = None, **kwargs: Any) -> str:
    """Which backend and kernel would run a call, and why each other one would not; one line each.

    Takes the arguments of flash_dmattn_func or, where cu_seqlens_q is given by name, of
    flash_dmattn_varlen_func. Computes nothing.
    """
    if backend is not None:
        _backends.check_name("explain", "backend", backend)
    make_problem = packed_problem if "cu_seqlens_q" in kwargs else padded_problem
    return _backends.explain(make_problem("explain", *args, **kwargs), backend)
