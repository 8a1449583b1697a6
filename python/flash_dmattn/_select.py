"""Selection in plain tensor operations, for devices without a kernel of their own: exact, no host sync.

    expiry_j = max(j, the w-th smallest of the positions of the keys that outrank j);   Sk if fewer than w do

since from that position on w better keys are there. With the keys sorted by descending rank, those that
outrank the r-th are the prefix [0, r) of the sorted list: what is needed is the w-th smallest value of every
prefix of a permutation. A wavelet matrix finds all of them together, one bit at a time, in O(N log N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["select_keys"]


def select_keys(
    score: Tensor,
    keep_window_size: int,
    is_causal: bool = True,
    num_sinks: int = 0,
    local_window: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """int32, shaped like score: [B, Hkv, Sk], or packed [total_k, Hkv] with cu_seqlens."""
    packed = cu_seqlens is not None
    score = (score.detach().T if packed else score.detach()).contiguous()  # [..., N]
    length = score.shape[-1]
    if length == 0:
        return (score.T if packed else score).to(torch.int32)

    index = torch.arange(length, device=score.device)
    if packed:
        # Sequence of every key; bad values of cu_seqlens must not lead out of bounds.
        bounds = cu_seqlens.long()
        sequence = (torch.bucketize(index, bounds, right=True) - 1).clamp(min=0)
        bounds = torch.nn.functional.pad(bounds, (0, 1))
        start = torch.minimum(bounds[sequence].clamp(min=0), index)
        seqlen = torch.maximum(bounds[sequence + 1], index + 1) - start
    else:
        sequence, start, seqlen = None, index * 0, index * 0 + length

    enabled = score > -math.inf  # False for NaN
    order = _order_of_rank(score, enabled, sequence)
    if is_causal:
        outranking = index - start  # how many keys outrank the one in this slot of the sorted list
        leaves = _kth_smallest(order, start, keep_window_size - 1)
        leaves = torch.where(outranking >= keep_window_size, torch.maximum(leaves, order), start + seqlen)
    else:
        selected = index - start < keep_window_size
        leaves = torch.where(selected, start + seqlen, order)
    expiry = torch.empty_like(order).scatter_(-1, order, leaves)

    position = index - start
    expiry = torch.where(enabled, expiry - start, position)
    guaranteed = torch.where(position < num_sinks, seqlen, torch.minimum(position + local_window, seqlen))
    expiry = torch.where(enabled, torch.maximum(expiry, guaranteed), expiry).to(torch.int32)
    return expiry.T.contiguous() if packed else expiry


def _order_of_rank(score: Tensor, enabled: Tensor, sequence: Tensor | None) -> Tensor:
    """The indices of the keys by descending rank, disabled keys last; sequence by sequence where packed."""
    rank = torch.where(enabled, score, -math.inf).masked_fill(score == 0, 0.0)  # -0 equals +0 in every sort
    # A stable sort of the reversed axis puts the later of equal keys first.
    order = score.shape[-1] - 1 - torch.sort(rank.flip(-1), dim=-1, descending=True, stable=True).indices
    if sequence is not None:
        by_sequence = torch.sort(sequence.expand(order.shape).gather(-1, order), dim=-1, stable=True).indices
        order = order.gather(-1, by_sequence)
    return order


def _kth_smallest(values: Tensor, start: Tensor, k: int) -> Tensor:
    """For every slot r of values [..., N], a permutation of 0 .. N - 1: the k-th smallest (from 0) of
    values[start:r].

    Slots with fewer than k + 1 such values get an arbitrary result within 0 .. N - 1 or slightly above.
    """
    length = values.shape[-1]
    low = start.expand(values.shape)
    high = torch.arange(length, device=values.device).expand(values.shape)
    remaining = torch.full_like(values, min(k, length))
    result = torch.zeros_like(values)
    slot = torch.arange(length, device=values.device)
    num_bits = next(bits for bits in range(1, 32) if length <= 1 << bits)  # traceable: length may be symbolic
    for bit in reversed(range(num_bits)):
        ones = (values >> bit) & 1
        zeros_before = torch.nn.functional.pad((1 - ones).cumsum(-1), (1, 0))  # [..., N + 1]
        num_zeros = zeros_before[..., -1:]
        zeros_low, zeros_high = zeros_before.gather(-1, low), zeros_before.gather(-1, high)
        go_to_ones = remaining >= zeros_high - zeros_low
        result = result | (go_to_ones.long() << bit)
        remaining = torch.where(go_to_ones, remaining - (zeros_high - zeros_low), remaining)
        low = torch.where(go_to_ones, num_zeros + low - zeros_low, zeros_low)
        high = torch.where(go_to_ones, num_zeros + high - zeros_high, zeros_high)
        # Stable partition by this bit: zeros first.
        target = torch.where(ones == 1, num_zeros + slot - zeros_before[..., :-1], zeros_before[..., :-1])
        values = torch.empty_like(values).scatter_(-1, target, values)
    return result
