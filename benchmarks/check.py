"""Whether results are right: nothing is timed before this has said so.

The whole selection is compared with the exact one, by equality. The rest is computed anew in float64 for
sampled queries (out, lse, dq, from the inputs alone) and sampled keys (dk, dv, dscore, with the method's own
lse and out, which the queries have checked); every element has a bound of its own, from the terms that it
sums. Sums over whole tensors that need no reference cover what is not sampled. One batch entry and key/value
head at a time, which bounds the memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods import Results
from problem import Problem

FLOAT32 = 2.0**-24
UNIT = {torch.float32: FLOAT32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUBNORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}  # the smallest
Z = 7.0  # standard deviations; beyond it no right kernel comes in millions of elements
BLOCK = 8  # sampled positions come in runs, which end where something does: the start, the window, the end
SAMPLED = 2**23  # pairs of sampled queries and keys, about; fewer than three runs are never taken


class WrongResult(Exception):
    pass


def check(problem: Problem, results: Results, expiry: Tensor, bias: str) -> str:
    """What was compared, in words; raises WrongResult. expiry: the exact selection; bias: the method's."""
    case = problem.case
    if "expiry" in results:
        wrong = int((results["expiry"] != expiry).sum())
        if wrong:
            raise WrongResult(f"expiry: {wrong} of {expiry.numel()} keys differ from the exact selection")
    limit = SAMPLED // (case.batch * case.heads * case.seqlen_k)
    rows = _sample(case.seqlen_q, case.keep_window, limit).to(case.device)
    elements = 0
    for b in range(case.batch):
        for g in range(case.heads_kv):
            head = _Head(problem, results, expiry, bias, b, g)
            head.check_queries(rows)
            if case.backward and "lse" in results:
                head.check_keys(rows)  # as many queries as keys: the same positions
            if case.backward:
                head.check_sums()
            elements += head.elements
    return f"{elements} elements at {len(rows)} of {case.seqlen_q} positions"


def _sample(seqlen: int, keep_window: int, limit: int) -> Tensor:
    """About `limit` positions: around both ends and the first eviction, and evenly between."""
    blocks = max(3, limit // BLOCK)
    starts = [0, seqlen - BLOCK, keep_window - BLOCK // 2, keep_window + 7]
    starts += torch.linspace(0, seqlen - BLOCK, blocks - 2).long().tolist()
    chosen = {min(max(start + i, 0), seqlen - 1) for start in starts[: max(blocks, 4)] for i in range(BLOCK)}
    return torch.tensor(sorted(chosen))


class _Head:
    """The formulas of docs/math.md in float64 for batch entry b and key/value head g. The rows of a group's
    query heads stand one after the other: [group * rows, D]."""

    def __init__(self, problem: Problem, results: Results, expiry: Tensor, bias: str, b: int, g: int):
        case = self.case = problem.case
        self.where = [b, g]
        self.heads = slice(g * case.group, (g + 1) * case.group)
        self.query, self.dout = (x.detach()[b, :, self.heads] for x in (problem.query, problem.dout))
        self.key, self.value = (x.detach()[b, :, g].double() for x in (problem.key, problem.value))
        by_head = {"lse": self.heads, "dscore": g, "dk": g, "dv": g}
        self.results = {
            name: x[b, by_head[name]] if name in ("lse", "dscore") else x[b, :, by_head.get(name, self.heads)]
            for name, x in results.items()
            if name != "expiry"
        }
        score = problem.score.detach()[b, g]
        self.bias = {"score": score, "rounded": score.to(case.dtype), "none": torch.zeros_like(score)}[bias]
        self.bias = self.bias.double()
        self.expiry = torch.full_like(expiry[b, g], case.seqlen_k) if bias == "none" else expiry[b, g]
        self.first = case.seqlen_k - case.seqlen_q  # position of the first row
        self.position = torch.arange(case.seqlen_k, device=case.device)
        self.scale = case.head_dim**-0.5
        self.elements = 0

    def _rows(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:  # [Sq, group, D]
        return x[rows].transpose(0, 1).flatten(0, 1).double()

    def _units(self, logits: Tensor) -> tuple[float, float]:
        """h, half the unit roundoff of P and dS in the matrix products, and that of what is stored."""
        single = FLOAT32 * (8 + 2 * logits[logits.isfinite()].abs().max().item())
        unit = UNIT[self.case.dtype]
        return (single / 2 if unit == FLOAT32 else math.hypot(unit / 2, single)), unit

    def _errors(self, P: Tensor, dS: Tensor, dout: Tensor, value: Tensor, delta: Tensor, h: float) -> Tensor:
        """Variance of dS but for delta's: its own rounding and the float32 arithmetic before it."""
        e = 8 * FLOAT32 * P * (dout.abs() @ value.abs().T + delta.abs())
        return (h * dS).square() + e.square()

    def check_queries(self, rows: Tensor) -> None:
        query, key, value = self._rows(self.query, rows), self.key, self.value
        at = (rows + self.first).repeat(self.case.group)[:, None]
        sees = (self.position <= at) & (at < self.expiry)
        logits = (self.scale * query @ key.T + self.bias).masked_fill(~sees, -torch.inf)
        h, u = self._units(logits)
        lse = logits.logsumexp(-1)
        if "lse" in self.results:
            actual = self.results["lse"][:, rows].flatten()
            self._compare("lse", actual, lse, 1e-5 + 2.0**-20 * lse.abs())
        P = (logits - lse[:, None]).exp()
        del logits, sees
        out, out_variance = P @ value, h * h * (P.square() @ value.square())
        bound = u * out.abs() + Z * out_variance.sqrt() + 4 * FLOAT32 * (P @ value.abs())
        self._compare("out", self._rows(self.results["out"], rows), out, bound)
        if not self.case.backward:
            return
        dout = self._rows(self.dout, rows)
        delta = (dout * out).sum(-1, keepdim=True)
        delta_variance = (dout.square() * ((u / 2 * out).square() + out_variance)).sum(-1, keepdim=True)
        dS = P * (dout @ value.T - delta)
        dq = self.scale * dS @ key
        variance = self._errors(P, dS, dout, value, delta, h) @ key.square()
        variance += delta_variance * (P @ key).square()
        bound = u * dq.abs() + self.scale * (Z * variance.sqrt() + 4 * FLOAT32 * (dS.abs() @ key.abs()))
        self._compare("dq", self._rows(self.results["dq"], rows), dq, bound)

    def check_keys(self, keys: Tensor) -> None:
        query, dout, out = (self._rows(x) for x in (self.query, self.dout, self.results["out"]))
        key, value = self.key[keys], self.value[keys]
        at = (self.position[self.first :]).repeat(self.case.group)[:, None]
        sees = (keys <= at) & (at < self.expiry[keys])  # [group * Sq, keys]
        logits = self.scale * query @ key.T + self.bias[keys]
        h, u = self._units(logits.masked_fill(~sees, 0))
        lse = self.results["lse"].flatten().double()[:, None]
        P = (logits - lse).exp().masked_fill(~sees, 0)
        products = dout * out
        delta = products.sum(-1, keepdim=True)
        delta_variance = products.square().sum(-1, keepdim=True) * (u / 2) ** 2
        dS = P * (dout @ value.T - delta)
        variance = self._errors(P, dS, dout, value, delta, h) + P.square() * delta_variance

        def bound(stored: Tensor, squares: Tensor, terms: Tensor, unit: float = u) -> Tensor:
            return unit * stored.abs() + Z * squares.sqrt() + 4 * FLOAT32 * terms

        s, found = self.scale, self.results
        dk, dv, dscore = s * dS.T @ query, P.T @ dout, dS.sum(0)
        dk_bound = bound(dk, s * s * (variance.T @ query.square()), s * (dS.abs().T @ query.abs()))
        dv_bound = bound(dv, h * h * (P.square().T @ dout.square()), P.T @ dout.abs())
        self._compare("dk", found["dk"][keys], dk, dk_bound)
        self._compare("dv", found["dv"][keys], dv, dv_bound)
        dscore_bound = bound(dscore, variance.sum(0), dS.abs().sum(0), 2.0**-22)
        self._compare("dscore", found["dscore"][keys], dscore, dscore_bound)

    def check_sums(self) -> None:
        """sum_j dv_j = sum_i dout_i; sum_j dscore_j = 0; <q, dq> = <k, dk>. The bounds take the errors of
        elements to be independent; a row or a key that is lost is far outside."""
        u = max(UNIT[self.case.dtype], 16 * FLOAT32)
        dv, dout = self.results["dv"].double(), self._rows(self.dout)
        bound = Z * u * (dout.square().sum(0) + dv.square().sum(0)).sqrt() + 4 * FLOAT32 * dout.abs().sum(0)
        self._compare("sum of dv", dv.sum(0), dout.sum(0), bound)
        by_query = self._rows(self.query) * self._rows(self.results["dq"])
        by_key = self.key * self.results["dk"].double()
        bound = Z * u * (by_query.square().sum() + by_key.square().sum()).sqrt()
        self._compare("<q, dq> - <k, dk>", by_query.sum(), by_key.sum(), bound)
        if "dscore" in self.results:
            dscore = self.results["dscore"].double()
            bound = Z * u * dscore.square().sum().sqrt() + 4 * FLOAT32 * dscore.abs().sum()
            self._compare("sum of dscore", dscore.sum(), torch.zeros_like(bound), bound)

    def _compare(self, name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
        if name in ("out", "dq", "dk", "dv"):
            bound = bound + SUBNORMAL[self.case.dtype] / 2
        excess = (actual.double() - expected).abs() / bound.clamp(min=1e-300)
        self.elements += excess.numel()
        if (excess <= 1).all():
            return
        flat = torch.nan_to_num(excess, torch.inf).argmax()
        worst = tuple(int(i) for i in torch.unravel_index(flat, excess.shape))
        raise WrongResult(
            f"{name} of batch entry and key/value head {self.where}: {int((~(excess <= 1)).sum())} of "
            f"{excess.numel()} elements are beyond their bound; the worst, {list(worst)}: got "
            f"{actual[worst]:.9g}, expected {expected[worst]:.9g} +- {bound[worst]:.2g}"
        )
