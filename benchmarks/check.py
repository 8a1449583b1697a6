"""Whether results are right: nothing is timed before this has said so.

The whole selection is compared with the reference's, by equality. The rest is computed anew in float64 for
sampled queries (out, lse, dq, from the inputs alone) and sampled keys (dk, dv, dscore, with the method's own
lse and out, which the queries have checked); every element has a bound of its own, from the terms that it
sums. Sums over whole tensors that need no reference cover what is not sampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cases import Problem
from methods import Results

FLOAT32 = 2.0**-24
UNIT = {torch.float32: FLOAT32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Z = 7.0  # standard deviations; beyond it no right kernel comes in millions of elements
BLOCK = (
    8  # sampled queries and keys come in runs, which end where something does: the start, the window, the end
)


class WrongResult(Exception):
    pass


def check(problem: Problem, results: Results, expiry: Tensor | None) -> str:
    """What was compared, in words; raises WrongResult. expiry is the exact selection, None where the method
    lets every query see all keys before it."""
    case = problem.case
    if "expiry" in results:
        wrong = int((results["expiry"] != expiry).sum())
        if wrong:
            raise WrongResult(f"expiry: {wrong} of {expiry.numel()} keys differ from the reference")
    exact = _Exact(problem, expiry)
    limit = 2**23 // (case.batch * case.heads * case.seqlen)
    sample = _sample(case.seqlen, case.keep_window, limit).to(case.device)
    exact.check_queries(results, sample)
    if case.backward:
        if "lse" in results:
            exact.check_keys(results, sample)
        exact.check_sums(results)
    return f"{exact.elements} elements at {len(sample)} of {case.seqlen} positions"


def _sample(seqlen: int, keep_window: int, limit: int) -> Tensor:
    """About `limit` positions: around both ends and the first eviction, and evenly between."""
    blocks = max(3, limit // BLOCK)
    starts = [0, seqlen - BLOCK, keep_window - BLOCK // 2, keep_window + 7]
    starts += torch.linspace(0, seqlen - BLOCK, blocks - 2).long().tolist()
    chosen = {min(max(start, 0) + i, seqlen - 1) for start in starts[: max(blocks, 4)] for i in range(BLOCK)}
    return torch.tensor(sorted(chosen))


class _Exact:
    """The formulas of docs/math.md in float64; the query heads of a group have the third axis."""

    def __init__(self, problem: Problem, expiry: Tensor | None):
        case = self.case = problem.case
        self.scale = case.head_dim**-0.5
        self.elements = 0
        self.dtype = case.dtype
        self.query, self.dout = (self._by_group(x.detach()) for x in (problem.query, problem.dout))
        self.key, self.value = (x.detach().transpose(1, 2).unsqueeze(2) for x in (problem.key, problem.value))
        score = problem.score.detach().unsqueeze(2)  # [B, Hkv, 1, N]
        self.bias = torch.zeros_like(score) if expiry is None else score
        self.expiry = torch.full_like(score, case.seqlen) if expiry is None else expiry.unsqueeze(2)
        self.position = torch.arange(case.seqlen, device=case.device)

    def _by_group(self, x: Tensor) -> Tensor:  # [B, N, H, D] -> [B, Hkv, group, N, D]
        return x.transpose(1, 2).unflatten(1, (self.case.heads_kv, -1))

    def _units(self, logits: Tensor) -> tuple[float, float]:
        """h, half the unit roundoff of P and dS in the matrix products, and that of what is stored."""
        single = FLOAT32 * (8 + 2 * logits[logits.isfinite()].abs().max().item())
        unit = UNIT[self.dtype]
        return (single / 2 if self.dtype == torch.float32 else math.hypot(unit / 2, single)), unit

    def check_queries(self, results: Results, rows: Tensor) -> None:
        query, dout = self.query[..., rows, :].double(), self.dout[..., rows, :].double()
        key, value = self.key.double(), self.value.double()
        sees = (self.position <= rows[:, None]) & (rows[:, None] < self.expiry[..., None, :])
        logits = self.scale * query @ key.mT + self.bias[..., None, :].double()
        logits = logits.masked_fill(~sees, -torch.inf)
        h, u = self._units(logits)
        lse = logits.logsumexp(-1)
        if "lse" in results:
            actual = results["lse"].unflatten(1, (self.case.heads_kv, -1))[..., rows]
            self._compare("lse", actual, lse, 1e-5 + 2.0**-20 * lse.abs())
        P = (logits - lse[..., None]).exp()
        out, out_variance = P @ value, h * h * (P.square() @ value.square())
        bound = u * out.abs() + Z * out_variance.sqrt() + 4 * FLOAT32 * (P @ value.abs())
        self._compare("out", self._by_group(results["out"])[..., rows, :], out, bound)
        if not self.case.backward:
            return
        delta = (dout * out).sum(-1, keepdim=True)
        delta_variance = (dout.square() * ((u / 2 * out).square() + out_variance)).sum(-1, keepdim=True)
        dS = P * (dout @ value.mT - delta)
        e = 8 * FLOAT32 * P * (dout.abs() @ value.abs().mT + delta.abs())
        dq = self.scale * dS @ key
        variance = ((h * dS).square() + e.square()) @ key.square() + delta_variance * (P @ key).square()
        bound = u * dq.abs() + self.scale * (Z * variance.sqrt() + 4 * FLOAT32 * (dS.abs() @ key.abs()))
        self._compare("dq", self._by_group(results["dq"])[..., rows, :], dq, bound)

    def check_keys(self, results: Results, keys: Tensor) -> None:
        query, dout = self.query.double(), self.dout.double()
        key, value = self.key[..., keys, :].double(), self.value[..., keys, :].double()
        position = self.position[:, None]
        sees = (keys <= position) & (position < self.expiry[..., None, keys])  # [B, Hkv, 1, N, keys]
        lse = results["lse"].unflatten(1, (self.case.heads_kv, -1)).double()
        out = self._by_group(results["out"]).double()
        logits = self.scale * query @ key.mT + self.bias[..., None, keys].double()
        h, u = self._units(logits.masked_fill(~sees, 0))
        P = (logits - lse[..., None]).exp().masked_fill(~sees, 0)
        delta = (dout * out).sum(-1, keepdim=True)
        delta_variance = (dout * out).square().sum(-1, keepdim=True) * (u / 2) ** 2
        dS = P * (dout @ value.mT - delta)
        e = 8 * FLOAT32 * P * (dout.abs() @ value.abs().mT + delta.abs())

        def over_queries(weights: Tensor, rows: Tensor) -> Tensor:  # [B, Hkv, keys, D]
            return (weights.mT @ rows).sum(2)

        dS_variance = (h * dS).square() + e.square() + P.square() * delta_variance
        dk, dv = self.scale * over_queries(dS, query), over_queries(P, dout)
        dk_bound = Z * over_queries(dS_variance, query.square()).sqrt() + 4 * FLOAT32 * over_queries(
            dS.abs(), query.abs()
        )
        dv_bound = Z * h * over_queries(P.square(), dout.square()).sqrt() + 4 * FLOAT32 * over_queries(
            P, dout.abs()
        )
        self._compare(
            "dk", results["dk"].transpose(1, 2)[:, :, keys], dk, u * dk.abs() + self.scale * dk_bound
        )
        self._compare("dv", results["dv"].transpose(1, 2)[:, :, keys], dv, u * dv.abs() + dv_bound)
        dscore = dS.sum((2, 3))
        bound = (
            Z * dS_variance.sum((2, 3)).sqrt() + 4 * FLOAT32 * dS.abs().sum((2, 3)) + 2.0**-22 * dscore.abs()
        )
        self._compare("dscore", results["dscore"][..., keys], dscore, bound)

    def check_sums(self, results: Results) -> None:
        """sum_j dv_j = sum_i dout_i; sum_j dscore_j = 0; <q, dq> = <k, dk>. The bounds take the errors of
        elements to be independent; a row or a key that is lost is far outside."""
        u = max(UNIT[self.dtype], 16 * FLOAT32)
        dv, dout = results["dv"].double(), self.dout.double()
        bound = Z * u * (
            dout.square().sum((2, 3)) + dv.square().sum(1)
        ).sqrt() + 4 * FLOAT32 * dout.abs().sum((2, 3))
        self._compare("sum of dv", dv.sum(1), dout.sum((2, 3)), bound)
        by_query = self.query.double() * self._by_group(results["dq"]).double()
        by_key = self.key.squeeze(2).double() * results["dk"].transpose(1, 2).double()
        variance = by_query.square().sum((2, 3, 4)) + by_key.square().sum((2, 3))
        self._compare(
            "<q, dq> - <k, dk>", by_query.sum((2, 3, 4)), by_key.sum((2, 3)), Z * u * variance.sqrt()
        )
        if "dscore" in results:
            dscore = results["dscore"].double()
            bound = Z * u * dscore.square().sum(-1).sqrt() + 4 * FLOAT32 * dscore.abs().sum(-1)
            self._compare("sum of dscore", dscore.sum(-1), torch.zeros_like(dscore[..., 0]), bound)

    def _compare(self, name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
        excess = (actual.double() - expected).abs() / bound.clamp(min=1e-300)
        self.elements += excess.numel()
        if (excess <= 1).all():
            return
        flat = torch.nan_to_num(excess, torch.inf).argmax()
        worst = tuple(int(i) for i in torch.unravel_index(flat, excess.shape))
        raise WrongResult(
            f"{name}: {int((~(excess <= 1)).sum())} of {excess.numel()} elements are beyond their bound; "
            f"the worst, {list(worst)}: got {actual[worst]:.9g}, expected {expected[worst]:.9g} "
            f"+- {bound[worst]:.2g}"
        )
