"""The plan as docs/plan.md defines it, in plain numpy, and the reader of the memory that the operator `plan`
fills. Nothing of the package.

`plan_of_head` is the definition; `PlanMemory` finds the same lists in an int32 tensor, by the layout of the
same document. A plan is a dict: segment -> Segment, for the segments in which a row of the call may stand.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 64
MIN_SEGMENT = 2048
MAX_SEGMENT = 2**30
INT32_MAX = 2**31 - 1
LOG2_E = np.float32(1.44269504088896340736)


@dataclass
class Segment:
    keys: np.ndarray  # [n]
    expiry: np.ndarray  # [n], at most the sequence's length
    bias: np.ndarray | None  # [n], times log2(e)
    hulls: np.ndarray  # [blocks, 4]: begin, end, core_begin, core_end


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def length_bound(seqlen_k: int, keep_window: int, has_expiry: bool, causal: bool) -> int | None:
    """L, if it follows from the sizes; None where the lists decide. seqlen_k: of all packed sequences."""
    keys = seqlen_k
    if causal and has_expiry and seqlen_k > MIN_SEGMENT:
        if keep_window == 0:
            return None
        keys = min(seqlen_k, keep_window)
    return min(max(power_of_two(keys), MIN_SEGMENT), MAX_SEGMENT)


def old_keys(expiry: np.ndarray, enabled: np.ndarray, start: int, first_seen: int) -> np.ndarray:
    """The keys before `start` that a position from there on sees, ascending."""
    return np.flatnonzero(enabled[:start] & (expiry[:start] > max(start, first_seen)))


def least_length(expiry: np.ndarray, enabled: np.ndarray, first_seen: int) -> int:
    length = MIN_SEGMENT
    while any(
        len(old_keys(expiry, enabled, segment * length, first_seen)) > length
        for segment in range(max(1, first_seen // length), (len(expiry) - 1) // length + 1)
    ):
        length *= 2
    return length


def by_rank(keys: np.ndarray, expiry: np.ndarray, score: np.ndarray | None) -> np.ndarray:
    """Highest first; of equal ones the later key first."""
    rank = expiry[keys] if score is None else np.where(np.isnan(score[keys]), -np.inf, score[keys])
    return keys[np.lexsort((keys, rank))[::-1]]


def hull_of(keys: np.ndarray, expiry: np.ndarray, begin: int, end: int) -> list[int]:
    births, deaths = np.maximum(keys, begin), np.minimum(expiry, end)
    return [births.min(), deaths.max(), births.max(), deaths.min()]


def plan_of_head(
    expiry: np.ndarray | None,
    score: np.ndarray | None,
    bias: np.ndarray | None,
    num_queries: int,
    seqlen_k: int,
    bound: int | None,
    causal: bool,
) -> tuple[int, dict[int, Segment]]:
    """One head of one sequence: L, and the lists."""
    expiry = np.full(seqlen_k, seqlen_k) if expiry is None else np.minimum(expiry.astype(np.int64), seqlen_k)
    enabled = np.full(seqlen_k, True) if bias is None else bias != -np.inf
    first_seen = max(seqlen_k - num_queries, 0) if causal else seqlen_k - 1
    length = least_length(expiry, enabled, first_seen) if bound is None else bound
    segments = {}
    for segment in range(first_seen // length if causal else 0, -(-seqlen_k // length) if causal else 1):
        begin, end = segment * length, min((segment + 1) * length, seqlen_k)
        old = old_keys(expiry, enabled, begin, first_seen)[:length]  # more do not fit
        born = np.arange(begin, end)
        born = born[enabled[born] & (expiry[born] > np.maximum(born, first_seen))]
        keys = np.concatenate([by_rank(old, expiry, score), born])
        blocks = [keys[at : at + BLOCK] for at in range(0, len(keys), BLOCK)]
        hulls = [hull_of(block, expiry[block], begin, end) for block in blocks]
        if not causal:
            hulls = [[0, INT32_MAX, 0, INT32_MAX]] * len(blocks)
        segments[segment] = Segment(
            keys,
            expiry[keys],
            None if bias is None else bias[keys] * LOG2_E,
            np.array(hulls, dtype=np.int64).reshape(-1, 4),
        )
    return length, segments


def waste(
    segments: dict[int, Segment], expiry: np.ndarray, num_queries: int, tile: int = 32
) -> tuple[float, float]:
    """Computed over needed pairs of a causal head without a bias, for tiles of `tile` positions that visit
    the blocks whose hull they meet; and entries per key."""
    seqlen_k = expiry.size
    first_seen = seqlen_k - num_queries
    computed = 0
    for segment in segments.values():
        begin = np.maximum(segment.hulls[:, 0] // tile * tile, first_seen)
        end = np.minimum(-(-segment.hulls[:, 1] // tile) * tile, seqlen_k)
        computed += BLOCK * int((end - begin).clip(0).sum())
    alive = np.minimum(expiry, seqlen_k).astype(np.int64) - np.maximum(np.arange(seqlen_k), first_seen)
    entries = sum(len(segment.keys) for segment in segments.values())
    return computed / int(alive.clip(0).sum()), entries / seqlen_k


class PlanMemory:
    """The arrays that the operator's tensor consists of, each on a cache line of its own."""

    def __init__(
        self,
        plan: torch.Tensor,
        total_k: int,
        sequences: int,
        heads: int,
        has_bias: bool,
        bound: int | None,
    ):
        words = plan.cpu().numpy()
        place = -plan.data_ptr() % 64 // 4

        def take(count: int, columns: int = 1) -> np.ndarray:
            nonlocal place
            taken = words[place : place + heads * count * columns].reshape(heads, count, columns)
            place += -(-taken.size // 16) * 16
            return taken

        num_segments = total_k // MIN_SEGMENT + sequences
        self.bound = bound
        self.entries = take(2 * total_k, 2)
        self.bias = take(2 * total_k)[..., 0].view(np.float32) if has_bias else None
        self.hulls = take(2 * total_k // BLOCK + num_segments, 4)
        self.sizes = take(num_segments)[..., 0]
        self.lengths = take(sequences)[..., 0] if bound is None else None
        self.end = place

    def head(
        self, head: int, sequence: int, begin: int, seqlen_k: int, causal: bool
    ) -> tuple[int, dict[int, Segment]]:
        """Every list that is not empty. begin: the sequence's first key among those of all sequences."""
        length = self.bound if self.bound is not None else int(self.lengths[head, sequence])
        segments = {}
        for segment in range(-(-seqlen_k // length) if causal else 1):
            size = self.sizes[head, begin // MIN_SEGMENT + sequence + segment]
            before = max(2 * segment - 1, 0) * length
            entries = self.entries[head, 2 * begin + before :][:size]
            block = 2 * begin // BLOCK + begin // MIN_SEGMENT + sequence + before // BLOCK + segment
            segments[segment] = Segment(
                entries[:, 0],
                entries[:, 1],
                None if self.bias is None else self.bias[head, 2 * begin + before :][:size],
                self.hulls[head, block:][: -(-size // BLOCK)],
            )
        return length, {segment: found for segment, found in segments.items() if len(found.keys) > 0}
