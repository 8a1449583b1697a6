"""The backend "flex": the same function through PyTorch's FlexAttention, for the key-only forms.

An oracle that shares no code with the kernels or the reference, and a fallback on GPUs. The interval mask is
a mask_mod over expiry, the bias a score_mod; the block mask leaves out the tiles in which nothing can be
visible. On CUDA FlexAttention is compiled, with its backward. On the CPU PyTorch's unfused implementation
runs, which holds Sq x Sk scores and has no backward: the compiled one has none either, and returns no lse.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from ._arguments import Problem

__all__ = ["attention", "why_not"]

TILE = 128  # rows and keys of a tile of the block mask


def why_not(problem: Problem) -> str:
    """Why the backend does not take the problem, or ""."""
    query, device = problem.query, problem.query.device.type
    if device not in ("cpu", "cuda"):
        return f"takes tensors on the CPU or on CUDA, not on {device}"
    if problem.is_dense:
        return "takes key-only masks and biases"
    if any(size == 0 for size in (*query.shape, *problem.key.shape)):
        return "takes no empty tensors"
    if device == "cuda":
        if query.dtype == torch.float64:
            return "takes no float64 on CUDA"
        if query.shape[-1] < 16:
            return f"takes head dims from 16 on CUDA, not {query.shape[-1]}"
    elif problem.needs_grad:
        return "FlexAttention has no backward on the CPU (call it under torch.no_grad())"
    elif torch.compiler.is_compiling():
        return "runs uncompiled on the CPU: no torch.compile"
    return ""


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """out and lse."""
    query, key, value, bias, expiry = problem.query, problem.key, problem.value, problem.bias, problem.expiry
    if problem.is_packed:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        bias = None if bias is None else bias.T.unsqueeze(0)
        expiry = None if expiry is None else expiry.T.unsqueeze(0)
    (batch, seqlen_q), (_, seqlen_k, heads_kv, _) = query.shape[:2], key.shape
    group = query.shape[2] // heads_kv
    if expiry is None:
        expiry = torch.full((1, 1, 1), seqlen_k, dtype=torch.int32, device=query.device)
    expiry = expiry.expand(batch, heads_kv, seqlen_k)
    if bias is not None:
        expiry = torch.where(bias.detach() == -math.inf, 0, expiry)
    if problem.is_packed:
        position, expiry = _one_after_the_other(problem, expiry)
    else:
        row = torch.arange(seqlen_q, device=query.device)
        position = row + (seqlen_k - seqlen_q) if problem.is_causal else row * 0 + (seqlen_k - 1)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= position[i]) & (position[i] < expiry[b, h // group, j])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b, h // group, j]

    # What no row sees may hold NaN, and 0 * NaN is NaN.
    unseen = ~_seen(position, expiry).transpose(1, 2).unsqueeze(-1)
    out, aux = _flex_attention(query.device.type)(
        (query if torch.is_grad_enabled() else query.detach()).transpose(1, 2),
        key.masked_fill(unseen, 0).transpose(1, 2),
        value.masked_fill(unseen, 0).transpose(1, 2),
        score_mod=None if bias is None else score_mod,
        block_mask=_block_mask(mask_mod, position, expiry, group),
        scale=problem.scale,
        enable_gqa=group > 1,
        return_aux=AuxRequest(lse=True),
    )
    out = out.transpose(1, 2).contiguous()
    return (out.squeeze(0), aux.lse.squeeze(0)) if problem.is_packed else (out, aux.lse)


def _flex_attention(device: str) -> Callable:
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled() if device == "cuda" else _unfused


@functools.cache
def _compiled() -> Callable:
    # PyTorch compiles eight kinds of calls (dtype, head dim, bias or none) in a process. For more it warns
    # and runs the unfused implementation: torch._dynamo.config.recompile_limit.
    return torch.compile(flex_attention)


def _unfused(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)


def _one_after_the_other(problem: Problem, expiry: Tensor) -> tuple[Tensor, Tensor]:
    """Packed sequences as one: the position of every row and the expiry of every key, counted from the first
    key of all. No interval then reaches beyond its sequence. Wrong cu_seqlens give wrong results, no worse.
    """
    row, sequence, bounds_q = _tokens(problem.cu_seqlens_q, problem.query.shape[0])
    _, sequence_k, bounds_k = _tokens(problem.cu_seqlens_k, problem.key.shape[0])
    start, end = bounds_k[sequence], bounds_k[sequence + 1]
    position = row - bounds_q[sequence + 1] + end if problem.is_causal else end - 1
    position = torch.where(position < start, -1, position)  # a row without keys
    start, end = bounds_k[sequence_k], bounds_k[sequence_k + 1]
    return position, torch.minimum(start + expiry.clamp(min=0), end).to(torch.int32)


def _tokens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The index and the sequence of every token, and cu_seqlens with one more entry, so that a token beyond
    the end of the last sequence has an end, too."""
    token = torch.arange(length, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = (torch.bucketize(token, bounds, right=True) - 1).clamp(min=0)
    return token, sequence, pad(bounds, (0, 1))


def _seen(position: Tensor, expiry: Tensor) -> Tensor:
    """Bool, shaped like expiry: whether any row's position lies in [j, expiry_j)."""
    position = position.sort().values
    key = torch.arange(expiry.shape[-1], device=expiry.device)
    rows_before_expiry = torch.searchsorted(position, expiry.to(position.dtype).contiguous())
    return rows_before_expiry > torch.searchsorted(position, key)


def _block_mask(mask_mod, position: Tensor, expiry: Tensor, group: int) -> BlockMask:
    """Visits the tiles whose rows meet the hull [first key, last expiry) of their keys; mask_mod decides
    within."""
    seqlen_q, seqlen_k = position.shape[0], expiry.shape[-1]
    pad_q, pad_k = -seqlen_q % TILE, -seqlen_k % TILE
    lowest = pad(position, (0, pad_q), value=seqlen_k).unflatten(0, (-1, TILE)).amin(-1)
    highest = pad(position, (0, pad_q), value=-1).unflatten(0, (-1, TILE)).amax(-1)
    last_expiry = pad(expiry, (0, pad_k)).unflatten(-1, (-1, TILE)).amax(-1)
    first_key = torch.arange(last_expiry.shape[-1], device=expiry.device) * TILE
    visit = (first_key <= highest[:, None]) & (lowest[:, None] < last_expiry[..., None, :])
    visit = visit.repeat_interleave(group, dim=1).to(torch.int32)  # [B, H, tiles of rows, tiles of keys]
    return BlockMask.from_kv_blocks(
        visit.sum(-1, dtype=torch.int32),
        torch.argsort(visit, dim=-1, descending=True, stable=True).to(torch.int32),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(seqlen_q, seqlen_k),
    )
