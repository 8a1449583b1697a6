"""The specification in eager PyTorch: what every backend has to compute, written to be read.

Any floating dtype (float16 and bfloat16 are computed in float32), any device, differentiable by autograd
(twice, too), every mask and bias form. Memory and time are O(Sq * Sk). Optimised code never imports this
file; it also serves as the backend "reference".

    p(i)    = i + Sk - Sq                                 position of query row i
    S(i)    = the w keys of highest rank among { j <= p(i) : score[b,g,j] > -inf }
              rank: higher score first (-0 equals +0; NaN counts as -inf); of equal scores the LATER key first
              not causal: the same S for every row, chosen among all j < Sk
    s(i,j)  = scale * <q_i, k_j> + bias[b,g,j]
    P(i,:)  = softmax over S(i);   out_i = sum_j P(i,j) v_j;   lse_i = log sum_j exp s(i,j)
    S(i) empty: out_i = 0, lse_i = -inf, all its gradients 0

S(i + 1) is a subset of S(i) + {i + 1}, so S is given by one integer per key: key j is visible exactly to the
positions [j, expiry_j). docs/math.md has the proof.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

__all__ = ["attention", "attention_varlen", "select_keys", "visible"]


def select_keys(
    score: Tensor,
    keep_window_size: int,
    is_causal: bool = True,
    num_sinks: int = 0,
    local_window: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The expiry of every key: int32, shaped like score, [B, Hkv, Sk] or, with cu_seqlens, [total_k, Hkv]."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        sequences = [
            select_keys(score[start:end].T, keep_window_size, is_causal, num_sinks, local_window).T
            for start, end in zip(bounds, bounds[1:])
        ]
        return torch.cat(sequences or [score.new_empty(score.shape, dtype=torch.int32)]).contiguous()
    heads = score.detach().double().reshape(-1, score.shape[-1]) if score.numel() else score.new_empty(0, 0)
    select_head = _select_causal if is_causal else _select_not_causal
    expiry = torch.tensor(
        [
            _keep_on_top(select_head(head, keep_window_size), head, num_sinks, local_window)
            for head in heads.tolist()
        ],
        dtype=torch.int32,
    )
    return expiry.reshape(score.shape).to(score.device)


def _select_causal(score: list[float], keep_window_size: int) -> list[int]:
    """Walks the positions and keeps the S of the present one in a heap, the key of lowest rank on top."""
    expiry = list(range(len(score)))
    kept: list[
        tuple[float, int]
    ] = []  # (score, index) orders by rank: of equal scores the earlier key is lower
    for position, value in enumerate(score):
        if not value > -math.inf:  # NaN is not greater either
            continue
        heapq.heappush(kept, (value, position))
        if len(kept) > keep_window_size:
            _, evicted = heapq.heappop(kept)
            expiry[evicted] = position  # the key itself, if it ranks lowest: never visible
    for _, index in kept:
        expiry[index] = len(score)
    return expiry


def _select_not_causal(score: list[float], keep_window_size: int) -> list[int]:
    expiry = list(range(len(score)))
    enabled = [(value, index) for index, value in enumerate(score) if value > -math.inf]
    for _, index in heapq.nlargest(keep_window_size, enabled):
        expiry[index] = len(score)
    return expiry


def _keep_on_top(expiry: list[int], score: list[float], num_sinks: int, local_window: int) -> list[int]:
    """Attention sinks and a guaranteed local window, on top of w. Disabled keys stay disabled."""
    seqlen_k = len(expiry)
    for index, value in enumerate(score):
        if value > -math.inf:
            guaranteed = seqlen_k if index < num_sinks else min(seqlen_k, index + local_window)
            expiry[index] = max(expiry[index], guaranteed)
    return expiry


def visible(expiry: Tensor, seqlen_q: int, seqlen_k: int, is_causal: bool) -> Tensor:
    """The mask that expiry [B, Hkv, Sk] stands for: bool [B, Hkv, Sq, Sk], True where a row sees a key."""
    key = torch.arange(seqlen_k, device=expiry.device)
    if is_causal:
        position = torch.arange(seqlen_q, device=expiry.device)[:, None] + seqlen_k - seqlen_q
        return (key <= position) & (position < expiry[..., None, :])
    return (expiry > seqlen_k - 1)[..., None, :].expand(*expiry.shape[:-1], seqlen_q, seqlen_k)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    expiry: Tensor | None = None,
    dense_bias: Tensor | None = None,
    dense_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D] in query's dtype and lse [B, H, Sq] (natural log; float64 for float64, else float32).

    query [B, Sq, H, D], key and value [B, Sk, Hkv, D]; bias and expiry broadcastable to [B, Hkv, Sk];
    dense_bias and dense_mask (bool, True = visible) broadcastable to [B, H, Sq, Sk], their head axis 1, Hkv
    or H. A key is visible where expiry, dense_mask and causality all allow it.
    """
    (seqlen_q, heads_q, head_dim), (seqlen_k, heads_kv) = query.shape[1:], key.shape[1:3]
    group = heads_q // heads_kv if heads_kv else 1
    scale = head_dim**-0.5 if scale is None else scale
    compute_dtype = torch.promote_types(query.dtype, torch.float32)

    def by_group(dense: Tensor) -> Tensor:  # [B, 1 | Hkv | H, Sq, Sk] -> [B, 1 | Hkv, 1 | group, Sq, Sk]
        per_query_head = dense.shape[1] == heads_q and group != 1
        return dense.unflatten(1, (heads_kv, group)) if per_query_head else dense.unsqueeze(2)

    everywhere = torch.full((1, 1, seqlen_k), seqlen_k, device=query.device)
    sees = visible(everywhere if expiry is None else expiry, seqlen_q, seqlen_k, is_causal).unsqueeze(2)
    if dense_mask is not None:
        sees = sees & by_group(dense_mask)
    if bias is not None:
        sees = sees & (bias != -math.inf)[:, :, None, None]
    if dense_bias is not None:
        dense_bias = dense_bias.to(compute_dtype)
        sees = sees & by_group(dense_bias != -math.inf)
    sees = sees.expand(query.shape[0], heads_kv, group, seqlen_q, seqlen_k)

    with torch.autocast(query.device.type, enabled=False):
        # Keys that no row sees reach nothing, even where they hold NaN: 0 * NaN would.
        unseen = ~sees.any(2).any(2).transpose(1, 2).unsqueeze(-1)  # [B, Sk, Hkv, 1]
        k = key.to(compute_dtype).masked_fill(unseen, 0)
        v = value.to(compute_dtype).masked_fill(unseen, 0)
        q = query.to(compute_dtype).unflatten(2, (heads_kv, group))

        logits = scale * torch.einsum("bqhgd,bkhd->bhgqk", q, k)
        if bias is not None:
            logits = logits + bias.to(compute_dtype)[:, :, None, None]
        if dense_bias is not None:
            logits = logits + by_group(dense_bias)
        logits = logits.masked_fill(~sees, -math.inf)

        # Softmax shifted by the row's maximum. An empty row (maximum -inf) subtracts 0, since (-inf) - (-inf)
        # is NaN, and divides by 1: every term of it is then 0, in the gradients too.
        empty = ~sees.any(-1, keepdim=True)
        maximum = (
            logits.detach().amax(-1, keepdim=True) if seqlen_k else logits.new_empty(*logits.shape[:-1], 1)
        )
        maximum = maximum.masked_fill(empty | (maximum == -math.inf), 0)
        weights = torch.exp(logits - maximum)
        total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
        out = torch.einsum("bhgqk,bkhd->bqhgd", weights / total, v)
        lse = (maximum + torch.log(total)).masked_fill(empty, -math.inf)
    return out.flatten(2, 3).to(query.dtype), lse.squeeze(-1).flatten(1, 2)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    expiry: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Packed sequences, one after the other: query [total_q, H, D], key and value [total_k, Hkv, D], bias and
    expiry [total_k, Hkv]; out like query, lse [H, total_q]."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [query[:0]], [query[:0, :, 0].T.to(torch.promote_types(query.dtype, torch.float32))]
    for start_q, end_q, start_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        out, lse = attention(
            query[None, start_q:end_q],
            key[None, start_k:end_k],
            value[None, start_k:end_k],
            bias=None if bias is None else bias[start_k:end_k].T[None],
            expiry=None if expiry is None else expiry[start_k:end_k].T[None],
            scale=scale,
            is_causal=is_causal,
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)
