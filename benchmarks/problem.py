"""The tensors of a case, and the exact selection from its scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_dmattn import reference
from suites import Case

SCORES = {  # of normal [B, Hkv, N]
    "iid": lambda normal: normal,
    "recency": lambda normal: (
        normal + 3 * torch.arange(normal.shape[-1], device=normal.device) / normal.shape[-1]
    ),
    "equal": lambda normal: torch.ones_like(normal),
}


class Problem(NamedTuple):
    """The same for every method."""

    case: Case
    query: Tensor  # [B, Sq, H, D]
    key: Tensor  # [B, Sk, Hkv, D]
    value: Tensor
    score: Tensor  # [B, Hkv, Sk], float32: ranks the keys and is their bias
    dout: Tensor  # like query

    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.score


def make_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device, dtype=dtype)

    query, dout = (normal(case.batch, case.seqlen_q, case.heads, case.head_dim) for _ in range(2))
    key, value = (normal(case.batch, case.seqlen_k, case.heads_kv, case.head_dim) for _ in range(2))
    score = SCORES[case.score](normal(case.batch, case.heads_kv, case.seqlen_k, dtype=torch.float32))
    problem = Problem(case, query, key, value, score, dout)
    for tensor in problem.inputs():
        tensor.requires_grad_(case.backward)
    return problem


def exact_expiry(problem: Problem) -> Tensor:
    """By another implementation than the one that is measured: on CUDA the CPU's operator, which its tests
    hold against the definition; on the CPU the definition itself."""
    case, score = problem.case, problem.score.detach()
    if case.device == "cpu":
        return unseen_by_queries(reference.select_keys(score, case.keep_window), case.seqlen_q)
    expiry = torch.ops.flash_dmattn.select(score.cpu(), case.keep_window, True, 0, 0, None, case.seqlen_q)
    return expiry.to(case.device)


def unseen_by_queries(expiry: Tensor, num_queries: int) -> Tensor:
    """A key that none of the last queries sees expires where it is born."""
    seqlen_k = expiry.shape[-1]
    born = torch.arange(seqlen_k, dtype=expiry.dtype, device=expiry.device)
    return torch.where(expiry > born.clamp(min=seqlen_k - num_queries), expiry, born)


def visible_pairs(case: Case, expiry: Tensor | None) -> int:
    """Of all query heads; expiry None: all keys up to the query's position."""
    first = case.seqlen_k - case.seqlen_q
    born = torch.arange(case.seqlen_k).clamp(min=first)
    if expiry is None:
        return case.batch * case.heads * int((case.seqlen_k - born).sum())
    return case.group * int((expiry.cpu() - born).clamp(min=0).sum())
