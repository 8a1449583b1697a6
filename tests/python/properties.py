"""What holds of any correct result, checked without a reference: at any size, in O(result) memory.

Each function takes a kernel and a problem and returns failures. The bounds are those of tiers.py with the
reference replaced by what is at hand: a sum of n results may be off by Z times the root of the sum of their
variances.
"""

import torch

import tiers
from cases import Problem
from counters import count
from kernels import bit_for_bit
from oracle import FLOAT32
from tiers import UNIT, Failure

Z = 6.0
# Error of one dS in units of 2^-24 |dS|: dP and delta are each rounded 8 times over, and dS is what is left
# of them.
CANCELLATION = 64


class _Sums:
    """Results in float64, laid out [sequence rows, heads, D], with the noise levels that their dtypes
    give."""

    def __init__(self, kernel, problem: Problem, results: dict[str, torch.Tensor]):
        dtype = problem.query.dtype
        largest = (
            float(results["lse"].abs().where(results["lse"].isfinite(), 0).max())
            if results["lse"].numel()
            else 0.0
        )
        rule = tiers.rules(dtype, 2 * largest + 8, kernel.keeps_float32)[-1]
        double = dtype == torch.float64
        self.h = 1e-13 if double else rule.matrix
        self.h_dS = 1e-13 if double else max(rule.matrix, CANCELLATION * FLOAT32)
        self.u_o = UNIT[dtype] / 2
        self.single = 1e-15 if double else FLOAT32
        self.t = {name: tensor.detach().cpu().double() for name, tensor in results.items()}
        for name in ("query", "key", "value", "dout", "dlse", "cu_seqlens_q", "cu_seqlens_k"):
            tensor = getattr(problem, name)
            self.t[name] = None if tensor is None else tensor.detach().cpu().double()
        self.group = problem.query.shape[-2] // max(1, problem.key.shape[-2])
        self.packed = problem.cu_seqlens_q is not None
        lse = (
            self.t["lse"] if self.packed else self.t["lse"].transpose(1, 2)
        )  # [B, Sq, H]; packed [H, total_q]
        self.full = (lse.T if self.packed else lse) > -torch.inf  # rows that see a key
        self.sequences = [(b, b) for b in range(problem.query.shape[0])]
        if self.packed:
            ends = [bounds.long().tolist() for bounds in (self.t["cu_seqlens_q"], self.t["cu_seqlens_k"])]
            spans = [[slice(a, b) for a, b in zip(e, e[1:])] for e in ends]
            self.sequences = list(zip(*spans))

    def per_channel(self, tensor, side):
        """[sequences, Hkv, ...]: sums over rows and, on the query side (0), over the heads of a group."""
        group = self.group if side == 0 else 1
        rows = [tensor[where[side]] for where in self.sequences]  # [rows, heads] or [rows, heads, D]
        parts = [row.unflatten(1, (row.shape[1] // group, group)) for row in rows]
        return torch.stack([part.sum((0, 2)) for part in parts]) if parts else torch.zeros(0)

    def per_head(self, tensor, side):
        """[sequences, Hkv]: sums over everything else."""
        sums = self.per_channel(tensor, side)
        return sums.sum(-1) if sums.dim() == 3 else sums


def _judge(name: str, tensor: str, difference: torch.Tensor, allowed: torch.Tensor) -> list[Failure]:
    count("property", difference.numel())
    bad = ~(difference.abs() <= allowed)
    if not bad.any():
        return []
    worst = int(torch.where(bad, difference.abs() / allowed, 0).nan_to_num(torch.inf).argmax())
    return [
        Failure(
            "property",
            tensor,
            f"{name}: off by {difference.flatten()[worst]:.3g}, allowed "
            f"{allowed.flatten()[worst]:.3g} ({int(bad.sum())} of {bad.numel()} sums)",
        )
    ]


def sums_of_gradients(kernel, problem: Problem, results: dict[str, torch.Tensor]) -> list[Failure]:
    """sum dv = sum dout, sum dbias = sum dlse, <q, dq> = <k, dk>, <v, dv> = <out, dout>: per sequence and kv
    head."""
    s = _Sums(kernel, problem, results)
    t, full = s.t, s.full[..., None]
    dout = torch.where(full, t["dout"], 0.0)
    failures = []

    difference = s.per_channel(t["dv"], 1) - s.per_channel(dout, 0)
    allowed = Z * ((s.h**2) * s.per_channel(dout**2, 0) + s.u_o**2 * s.per_channel(t["dv"] ** 2, 1)).sqrt()
    failures += _judge(
        "sum of dv = sum of dout", "dv", difference, allowed + 8 * s.single * s.per_channel(dout.abs(), 0)
    )

    for name, tensor, left, right, noise in (
        ("<q, dq> = <k, dk>", "dq and dk", ("query", "dq", 0), ("key", "dk", 1), s.h_dS),
        ("<v, dv> = <out, dout>", "out and dv", ("out", "dout", 0), ("value", "dv", 1), s.h),
    ):
        products = [(_seen(t, a, b), side) for a, b, side in (left, right)]
        sums = [s.per_head(product, side) for product, side in products]
        squares = sum(s.per_head(product**2, side) for product, side in products)
        absolute = sum(s.per_head(product.abs(), side) for product, side in products)
        failures += _judge(
            name, tensor, sums[0] - sums[1], Z * (s.u_o + noise) * squares.sqrt() + 8 * s.single * absolute
        )

    if "dbias" in t:
        dlse = torch.zeros(full.shape[:-1]).double()
        if t["dlse"] is not None:
            dlse = torch.where(s.full, t["dlse"].T if s.packed else t["dlse"].transpose(1, 2), 0.0)
        # One row's dS sums to what its delta is wrong by: the stored output's rounding, and float32
        # arithmetic.
        size = (dout.abs() * _largest_value(s, problem)).sum(-1)
        row = (
            (dout**2 * t["out"] ** 2).sum(-1) * s.u_o**2
            + (CANCELLATION / 4 * s.single * size) ** 2
            + s.h**2 * (dout**2 * _largest_value(s, problem) ** 2).sum(-1)
        )
        dbias, by_key, by_row = (
            t["dbias"],
            lambda tensor: s.per_head(tensor, 1),
            lambda row: s.per_head(row, 0),
        )
        if problem.has_dense_bias:  # whose axes may be shared: one sum over everything
            by_key = by_row = lambda tensor: tensor.sum().reshape(1)
        elif not s.packed:
            dbias = dbias.transpose(1, 2)
        stored = (UNIT[problem.bias.dtype] / 2) ** 2 * by_key(dbias**2)
        failures += _judge(
            "sum of dbias = sum of dlse",
            "dbias",
            by_key(dbias) - by_row(dlse),
            Z * (by_row(row) + stored).sqrt() + 8 * s.single * (by_key(dbias.abs()) + by_row(dlse.abs())),
        )
    return failures


def _seen(t, first, second):
    """The product, 0 where the gradient is 0: an unseen key may hold NaN."""
    return torch.where((t[second] == 0) | (t[first] == 0), 0.0, t[first] * t[second])


def _largest_value(s: _Sums, problem: Problem) -> torch.Tensor:
    """max |v| per channel over everything, for every query head: [H, D]."""
    value = s.t["value"].nan_to_num(0).abs().flatten(0, -3)
    top = value.amax(0) if len(value) else value.new_zeros(value.shape[1:])
    return top.repeat_interleave(s.group, 0)


def constant_value(kernel, problem: Problem) -> list[Failure]:
    """V = 1 gives out = 1 wherever a row sees a key, and 0 elsewhere, exactly."""
    ones = problem.replace(value=torch.ones_like(problem.value))
    results = kernel.forward(ones, kernel.select(ones))
    out, lse = results["out"].cpu().double(), results["lse"].cpu()
    seen = (lse.T if problem.cu_seqlens_q is not None else lse.transpose(1, 2)) > -torch.inf
    unit = UNIT[problem.query.dtype]
    slack = 1e-13 if problem.query.dtype == torch.float64 else 16 * FLOAT32
    h = 0.0 if kernel.keeps_float32 else unit
    return _judge(
        "V = 1 gives out = 1",
        "out",
        out - seen[..., None].double(),
        torch.where(seen[..., None], unit + h + slack, 0.0).expand_as(out),
    )


def output_range(kernel, problem: Problem, results: dict[str, torch.Tensor]) -> list[Failure]:
    """Every output lies between the smallest and the largest value of its sequence and head."""
    s = _Sums(kernel, problem, results)
    failures = []
    for where in s.sequences:
        value = s.t["value"][where[1]].repeat_interleave(s.group, 1)
        out, full = s.t["out"][where[0]], s.full[where[0]][..., None]
        if value.shape[0] == 0 or out.numel() == 0:
            continue
        low, high = value.amin(0), value.amax(0)
        outside = torch.where(full, torch.maximum(out - high, low - out), 0.0).clamp(min=0)
        margin = (2 * UNIT[problem.query.dtype] + 16 * s.single) * torch.maximum(low.abs(), high.abs())
        failures += _judge("out within the range of the values", "out", outside, margin.expand_as(out))
    return failures


def zero_gradient(kernel, problem: Problem, results: dict[str, torch.Tensor]) -> list[Failure]:
    """dout = 0 gives gradients that are exactly 0."""
    quiet = problem.replace(dout=torch.zeros_like(problem.dout), dlse=None)
    grads = kernel.backward(quiet, kernel.select(problem), results["out"], results["lse"])
    count("property", len(grads))
    return [
        Failure("property", name, "dout = 0 gives gradients that are not 0")
        for name, grad in grads.items()
        if (grad != 0).any()
    ]


def repeats(kernel, problem: Problem, results: dict[str, torch.Tensor]) -> list[Failure]:
    again = kernel.run(problem)
    count("bitwise", len(again))
    return [
        Failure("bitwise", name, "a second run gives other bits")
        for name in again
        if not bit_for_bit(again[name], results[name])
    ]


def all_properties(kernel, problem: Problem, results: dict[str, torch.Tensor]) -> list[Failure]:
    return [
        *sums_of_gradients(kernel, problem, results),
        *constant_value(kernel, problem),
        *output_range(kernel, problem, results),
        *zero_gradient(kernel, problem, results),
        *repeats(kernel, problem, results),
    ]
