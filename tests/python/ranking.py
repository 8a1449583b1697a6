"""Selection as it is defined, in plain Python: the oracle of every expiry in this suite. Nothing of the
package.

Two forms. `rank_counts` is the definition itself: how many keys outrank each key at each position, by
comparing all pairs. `expiry` walks a sequence with a heap of w entries: Python floats hold every value of
every dtype exactly, and (score, index) tuples compare in the documented order. test_selection.py checks the
second against the first.
"""

import heapq
import math

import numpy as np
import torch


def rank_counts(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scores [n, length] float64 -> (counts [n, position, key], enabled [n, key]).

    counts[., i, j]: the enabled keys at or before position i that outrank key j. -0 equals +0 in IEEE
    comparison.
    """
    enabled = ~np.isnan(scores) & (scores != -np.inf)
    index = np.arange(scores.shape[1])
    higher = scores[:, :, None] > scores[:, None, :]
    later_tie = (scores[:, :, None] == scores[:, None, :]) & (index[:, None] > index[None, :])
    outranks = (higher | later_tie) & enabled[:, :, None]  # [n, rival, key]
    return np.cumsum(outranks, axis=1), enabled


def visible(scores: np.ndarray, keep_window: int, causal: bool) -> np.ndarray:
    """bool [n, position, key], by definition."""
    counts, enabled = rank_counts(scores)
    if not causal:
        counts = np.broadcast_to(counts[:, -1:, :], counts.shape)
        return (counts < keep_window) & enabled[:, None, :]
    length = scores.shape[1]
    past = np.arange(length)[:, None] >= np.arange(length)[None, :]
    return (counts < keep_window) & enabled[:, None, :] & past


def expiry_of_head(
    scores: list[float], keep_window: int, causal: bool, num_sinks: int = 0, local_window: int = 0
) -> list[int]:
    """The first position that no longer sees each key; the key's own position if none ever does."""
    length = len(scores)
    expiry = list(range(length))
    enabled = [not math.isnan(score) and score != -math.inf for score in scores]
    kept: list[tuple[float, int]] = []
    for position, score in enumerate(scores):
        if not enabled[position]:
            continue
        expiry[position] = length
        heapq.heappush(kept, (score, position))
        if len(kept) > keep_window:
            _, evicted = heapq.heappop(kept)
            expiry[evicted] = position if causal else evicted
    for position in range(length):
        if not enabled[position]:
            continue
        if position < num_sinks:
            expiry[position] = length
        if causal:
            expiry[position] = max(expiry[position], min(length, position + local_window))
    return expiry


def expiry(
    score: torch.Tensor,
    keep_window: int,
    causal: bool,
    num_sinks: int = 0,
    local_window: int = 0,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """score [B, Hkv, Sk], or packed [total_k, Hkv] with cu_seqlens -> int32 like score, on the CPU."""
    exact = score.detach().cpu().double()
    result = torch.empty(exact.shape, dtype=torch.int32)
    if cu_seqlens is None:
        heads = [(exact[b, g], result[b, g]) for b in range(exact.shape[0]) for g in range(exact.shape[1])]
    else:
        bounds = cu_seqlens.tolist()
        heads = [
            (exact[begin:end, g], result[begin:end, g])
            for begin, end in zip(bounds, bounds[1:])
            for g in range(exact.shape[1])
        ]
    for scores, target in heads:
        ends = expiry_of_head(scores.tolist(), keep_window, causal, num_sinks, local_window)
        target.copy_(torch.tensor(ends, dtype=torch.int32))
    return result
