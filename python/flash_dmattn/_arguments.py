"""From what the user passes to one canonical problem, checked at the door.

Every message reads "<function>: <argument>: got <what>, expected <what is accepted>" and is the same on every
device. An object of the wrong Python type is a TypeError; a wrong shape, dtype, device or value is a
ValueError. Nothing here synchronises with the device unless validate=True, and everything here can be traced
by torch.compile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._forms import KeyForms
from ._validation import (
    DTYPES,
    MAX_POSITION,
    check_bool,
    check_count,
    check_cu_seqlens,
    check_dtype,
    check_expiry_values,
    check_sequences,
    check_tensor,
    kind_of,
    refuse,
    shape_of,
    too_long,
    values_are_at_hand,
)


class Problem(NamedTuple):
    """One call of attention. Tensors are on one device; broadcast axes are expanded, dense forms excepted."""

    function: str  # what the user called, for messages
    query: Tensor  # [B, Sq, H, D], packed [total_q, H, D]
    key: Tensor  # [B, Sk, Hkv, D], packed [total_k, Hkv, D]
    value: Tensor
    bias: Tensor | None  # key-only, [B, Hkv, Sk], packed [total_k, Hkv]; float32 (float64 with float64)
    expiry: Tensor | None  # int32, shaped like bias
    score: Tensor | None  # to select from, broadcastable to bias's shape; -inf wherever a key is disabled
    keep_window_size: int | None  # present with score
    dense_bias: Tensor | None  # [B | 1, 1 | Hkv | H, Sq | 1, Sk], float64 with float64 alone
    dense_mask: Tensor | None  # bool, shaped likewise
    cu_seqlens_q: Tensor | None  # int32 [sequences + 1], packed only
    cu_seqlens_k: Tensor | None
    scale: float
    is_causal: bool
    return_lse: bool

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """Of bias and expiry."""
        *batch, seqlen_k, heads_kv, _ = self.key.shape
        return (seqlen_k, heads_kv) if self.is_packed else (*batch, heads_kv, seqlen_k)

    @property
    def is_dense(self) -> bool:
        return self.dense_bias is not None or self.dense_mask is not None

    @property
    def needs_grad(self) -> bool:
        tensors = (self.query, self.key, self.value, self.bias, self.dense_bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def padded_problem(
    function: str,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    attn_mask: Any = None,
    attn_bias: Any = None,
    scale: Any = None,
    is_causal: Any = False,
    *,
    keep_window_size: Any = None,
    attn_score: Any = None,
    expiry: Any = None,
    return_lse: Any = False,
    validate: Any = False,
    q: Any = None,
    k: Any = None,
    v: Any = None,
) -> Problem:
    """The arguments of flash_dmattn_func."""
    query, key, value = _aliases(function, query, key, value, q, k, v)
    return _problem(
        function, query, key, value, attn_mask, attn_bias, None, None, scale, is_causal,
        keep_window_size, attn_score, expiry, return_lse, validate, packed=False,
    )  # fmt: skip


def packed_problem(
    function: str,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    attn_mask: Any = None,
    attn_bias: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    scale: Any = None,
    is_causal: Any = False,
    *,
    keep_window_size: Any = None,
    attn_score: Any = None,
    expiry: Any = None,
    return_lse: Any = False,
    validate: Any = False,
    q: Any = None,
    k: Any = None,
    v: Any = None,
) -> Problem:
    """The arguments of flash_dmattn_varlen_func."""
    query, key, value = _aliases(function, query, key, value, q, k, v)
    problem = _problem(
        function, query, key, value, attn_mask, attn_bias, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        keep_window_size, attn_score, expiry, return_lse, validate, packed=True,
    )  # fmt: skip
    max_seqlens = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    for name, limit in max_seqlens.items():
        if limit is not None:
            check_count(function, name, limit, minimum=0)
    if validate or values_are_at_hand(cu_seqlens_q):
        check_sequences(function, cu_seqlens_q, cu_seqlens_k, max_seqlens, is_causal)
    return problem


def _problem(
    function: str,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    attn_bias: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    scale: Any,
    is_causal: Any,
    keep_window_size: Any,
    attn_score: Any,
    expiry: Any,
    return_lse: Any,
    validate: Any,
    packed: bool,
) -> Problem:
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse), ("validate", validate)):
        check_bool(function, name, flag)
    query, key, value = _check_qkv(function, query, key, value, packed, is_causal)
    scale = _check_scale(function, scale, query.shape[-1])
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    if packed:
        check_cu_seqlens(function, "cu_seqlens_q", cu_seqlens_q, query, validate)
        check_cu_seqlens(function, "cu_seqlens_k", cu_seqlens_k, key, validate)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            got = f"{shape_of(cu_seqlens_k)} beside cu_seqlens_q of {shape_of(cu_seqlens_q)}"
            refuse(function, "cu_seqlens_k", got, "one entry per sequence and one more in both")
    forms = KeyForms(function, query, key, packed)
    bias, dense_bias = forms.parse_bias(attn_bias)
    mask, dense_mask = forms.parse_mask(attn_mask, validate)
    score = forms.parse_score(attn_score)
    expiry = forms.parse_expiry(expiry)
    if validate and expiry is not None:
        check_expiry_values(function, expiry, cu_seqlens_k)
    _check_combination(function, bias, dense_bias, dense_mask, keep_window_size, score, expiry)

    if keep_window_size is not None:
        keep_window_size = check_count(function, "keep_window_size", keep_window_size, minimum=1)
        score = _score_of_enabled_keys(score, bias, mask)
    else:
        expiry = forms.hide_masked(expiry, mask)
    if bias is not None:
        bias = forms.expand(bias.to(accumulate))
    if dense_bias is not None and dense_bias.dtype == torch.float64:
        dense_bias = dense_bias.to(accumulate)
    return Problem(
        function=function,
        query=query,
        key=key,
        value=value,
        bias=bias,
        expiry=expiry,
        score=score,
        keep_window_size=keep_window_size,
        dense_bias=dense_bias,
        dense_mask=dense_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        is_causal=is_causal,
        return_lse=return_lse,
    )


class SelectProblem(NamedTuple):
    function: str
    score: Tensor
    keep_window_size: int
    is_causal: bool
    num_sinks: int
    local_window: int
    cu_seqlens: Tensor | None
    num_queries: int = -1  # the last rows, which alone will read expiry; -1: all


def select_problem(
    function: str,
    attn_score: Any,
    keep_window_size: Any,
    is_causal: Any,
    num_sinks: Any,
    local_window: Any,
    cu_seqlens: Any,
    validate: Any,
) -> SelectProblem:
    packed = cu_seqlens is not None
    layout = "[total_k, Hkv]" if packed else "[B, Hkv, Sk]"
    check_tensor(function, "attn_score", attn_score)
    if attn_score.dim() != (2 if packed else 3):
        refuse(function, "attn_score", shape_of(attn_score), layout)
    check_dtype(function, "attn_score", attn_score)
    if too_long(attn_score.shape[0 if packed else -1]):
        refuse(function, "attn_score", shape_of(attn_score), f"at most {MAX_POSITION} keys")
    check_bool(function, "is_causal", is_causal)
    check_bool(function, "validate", validate)
    keep_window_size = check_count(function, "keep_window_size", keep_window_size, minimum=1)
    num_sinks = check_count(function, "num_sinks", num_sinks, minimum=0)
    local_window = check_count(function, "local_window", local_window, minimum=0)
    if local_window > 0 and not is_causal:
        refuse(function, "local_window", f"{local_window} with is_causal=False", "0 unless causal")
    if packed:
        check_cu_seqlens(function, "cu_seqlens", cu_seqlens, attn_score, validate)
    return SelectProblem(
        function, attn_score.detach(), keep_window_size, is_causal, num_sinks, local_window, cu_seqlens
    )


def _aliases(function: str, query: Any, key: Any, value: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    if q is not None or k is not None or v is not None:
        names = (("query", query, "q", q), ("key", key, "k", k), ("value", value, "v", v))
        for name, tensor, alias, aliased in names:
            if tensor is not None and aliased is not None:
                raise TypeError(
                    f"{function}: {name}: got {name} and its alias {alias}, expected one of the two"
                )
        query, key, value = (tensor if aliased is None else aliased for _, tensor, _, aliased in names)
    return query, key, value


def _check_qkv(
    function: str, query: Any, key: Any, value: Any, packed: bool, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    layouts = ("[total_q, H, D]", "[total_k, Hkv, D]") if packed else ("[B, Sq, H, D]", "[B, Sk, Hkv, D]")
    for name, tensor, layout in (
        ("query", query, layouts[0]),
        ("key", key, layouts[1]),
        ("value", value, layouts[1]),
    ):
        check_tensor(function, name, tensor)
        if tensor.dim() != (3 if packed else 4):
            refuse(function, name, shape_of(tensor), layout)
        if tensor.device != query.device:
            refuse(function, name, f"a tensor on {tensor.device}", f"query's device, {query.device}")
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dtype(function, name, tensor)
        if tensor.dtype != query.dtype:
            refuse(function, name, str(tensor.dtype), f"query's dtype, {query.dtype}")

    heads_q, head_dim = query.shape[-2:]
    heads_kv = key.shape[-2]
    if value.shape != key.shape:
        refuse(function, "value", shape_of(value), f"key's shape, {shape_of(key)}")
    if key.shape[-1] != head_dim:
        refuse(function, "key", shape_of(key), f"query's head dim, {head_dim}, as its last size")
    if head_dim == 0:
        refuse(function, "query", shape_of(query), "a head dim of at least 1")
    if heads_q % heads_kv != 0 if heads_kv != 0 else heads_q != 0:
        got = f"{heads_q} heads beside {heads_kv} heads of key and value"
        refuse(function, "query", got, "a multiple of the number of key/value heads")
    if not packed and key.shape[0] != query.shape[0]:
        refuse(function, "key", shape_of(key), f"query's batch size, {query.shape[0]}, as its first size")
    seqlen_q, seqlen_k = query.shape[-3], key.shape[-3]
    if too_long(seqlen_q) or too_long(seqlen_k):
        got = f"{seqlen_q} queries and {seqlen_k} keys"
        refuse(function, "query, key", got, f"at most {MAX_POSITION} of each")
    if not packed and is_causal and seqlen_q > seqlen_k:
        got = f"{seqlen_q} queries beside {seqlen_k} keys with is_causal=True"
        refuse(function, "query", got, "at most as many queries as keys")
    return query, key, value


def _autocast(tensor: Tensor) -> Tensor:
    eligible = tensor.dtype in DTYPES and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if eligible else tensor


def _check_scale(function: str, scale: Any, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        refuse(function, "scale", kind_of(scale), "a number, or None for D ** -0.5", TypeError)
    if not -math.inf < scale < math.inf:
        refuse(function, "scale", str(scale), "a finite number")
    return float(scale)


def _check_combination(
    function: str,
    bias: Tensor | None,
    dense_bias: Tensor | None,
    dense_mask: Tensor | None,
    keep_window_size: Any,
    score: Tensor | None,
    expiry: Tensor | None,
) -> None:
    if keep_window_size is None:
        if score is not None:
            refuse(
                function,
                "attn_score",
                "a score without keep_window_size",
                "keep_window_size beside attn_score",
            )
        return
    if expiry is not None:
        got = "keep_window_size beside expiry"
        refuse(function, "keep_window_size", got, "one of the two: expiry already is a selection")
    for name, dense in (("attn_mask", dense_mask), ("attn_bias", dense_bias)):
        if dense is not None:
            refuse(
                function,
                name,
                f"{shape_of(dense)}, one row per query, beside keep_window_size",
                "a key-only form, or expiry=select_keys(attn_score, keep_window_size) instead of "
                "keep_window_size: visible is then what both allow",
            )
    if score is None and bias is None:
        got = f"{keep_window_size} without anything to rank the keys by"
        refuse(function, "keep_window_size", got, "attn_score or a key-only attn_bias beside it")


def _score_of_enabled_keys(score: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The score that ranks, -inf where the bias or the mask disables the key."""
    if score is None:
        score = bias
    elif bias is not None:
        score = torch.where(bias == -math.inf, -math.inf, score)
    score = score.detach()
    return score if mask is None else torch.where(mask, score, -math.inf)
