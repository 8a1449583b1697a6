"""Whether the gradients are right through to the parameters of the score, dt_proj and A; exit code 0 or 1.

    score = exp(A * softplus(v_flat @ W.T)),   out = flash_dmattn_func(q, k, v, attn_bias=score, ...)

The gradient of a parameter is a sum over keys of c_j dscore_j, where c_j follows from the score's formula;
that of a value has such a term, too. Sums of errors do not cancel like errors of independent elements: all
keys of a row share the error of its delta. So the oracle, which knows how, carries the columns c through:
they are appended to the keys, as channels where the query is 0, and the gradient of the query in channel c is
scale * sum_j dS_ij c_j with the terms of its bound. Rows are independent and add up.

    python benchmarks/grad_equivalence.py
    python benchmarks/grad_equivalence.py --device cpu --seed 3
"""

from __future__ import annotations

import dataclasses
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

import equivalence  # finds the modules of the test suite

# isort: split
import counters
import oracle
import tiers
from cases import Case, make
from flash_dmattn import flash_dmattn_func
from suites import DTYPE_NAMES

Z = 6.0
CHAIN = 16 * 2.0**-24  # of the absolute terms: PyTorch's float32 arithmetic between dscore and the parameters
CASES = {
    "length": [Case(1, n, n, 2, 1, 64, keep_window=256) for n in (256, 1024, 2048)],
    "window": [Case(1, 1024, 1024, 2, 1, 64, keep_window=w) for w in (32, 128, 512, 1024)],
    "batch": [Case(b, 512, 512, 2, 1, 32, keep_window=128) for b in (2, 4)],
    "heads": [Case(1, 512, 512, h, hkv, 64, keep_window=128) for h, hkv in ((1, 1), (4, 1), (8, 2), (4, 4))],
    "head_dim": [Case(1, 512, 512, 2, 1, d, keep_window=128) for d in (32, 96, 128, 192, 256)],
}


class Layer(NamedTuple):
    """The score's parameters and what leads to its gradients, for one batch of values."""

    weight: Tensor  # W, [Hkv, Hkv * D]
    A: Tensor  # [Hkv]
    flat: Tensor  # v_flat, [B, Sk, Hkv * D]

    def score(self) -> Tensor:  # [B, Hkv, Sk]
        dt = self.flat @ self.weight.T
        return torch.exp(self.A * softplus(dt)).transpose(1, 2)

    def columns(self, g: int) -> Tensor:
        """[B, Sk, 1 + Hkv * D]: d score_j / d A_g, then d score_j / d W_g."""
        dt = self.flat @ self.weight[g]
        score = torch.exp(self.A[g] * softplus(dt))
        by_dt = score * self.A[g] * torch.sigmoid(dt)
        return torch.cat([(score * softplus(dt))[..., None], by_dt[..., None] * self.flat], -1)

    def by_value(self) -> Tensor:
        """[B, Hkv, Sk]: d score_j / d dt_j."""
        dt = self.flat @ self.weight.T
        return (torch.exp(self.A * softplus(dt)) * self.A * torch.sigmoid(dt)).transpose(1, 2)

    def map(self, function) -> Layer:
        return Layer(*map(function, self))


def judged(case: Case, device: str) -> tuple[str, list[str]]:
    problem = make(dataclasses.replace(case, keep_window=None))
    generator = torch.Generator().manual_seed(case.seed + 1)
    width = case.heads_kv * case.head_dim
    weight = torch.randn(case.heads_kv, width, generator=generator) * width**-0.5
    A = torch.randn(case.heads_kv, generator=generator) / 2
    layer = Layer(weight, A, problem.value.flatten(2).float())
    actual, score = _ours(problem, layer, case, device)
    # Selection and logits are those of the very scores that the kernels got.
    problem = problem.replace(bias=score, score=score, keep_window=case.keep_window)
    answer = oracle.expected(problem)
    rule = tiers.rules(problem.query.dtype, answer.largest_logit, device == "cpu")[-1]
    direct = {name: actual[name] for name in ("out", "dq", "dk")}
    wrong = [str(f) for f in tiers.judge(direct, answer, problem.query.dtype, device == "cpu", ())]
    for name, (value, bound) in _through_the_score(problem, layer, answer, rule).items():
        ratio = float(((actual[name].double() - value).abs() / bound).nan_to_num(torch.inf).max())
        counters.record_worst(name, ratio)
        if not ratio <= 1:
            wrong.append(f"{name}: the worst error is {ratio:.3g} of what is allowed")
    return "every element:", wrong


def _ours(problem, layer: Layer, case: Case, device: str) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {name: getattr(problem, name) for name in ("query", "key", "value")}
    leaves |= {"dt_proj": layer.weight, "A": layer.A}
    leaves = {name: leaf.detach().clone().to(device).requires_grad_() for name, leaf in leaves.items()}
    query, key, value, weight, A = leaves.values()
    score = Layer(weight, A, value.flatten(2).float()).score()
    out = flash_dmattn_func(
        query, key, value, attn_bias=score, is_causal=True, keep_window_size=case.keep_window
    )
    gradients = torch.autograd.grad(out, tuple(leaves.values()), problem.dout.to(device))
    results = dict(zip(("dq", "dk", "dv", "dt_proj", "A"), gradients)) | {"out": out.detach()}
    return {name: x.cpu() for name, x in results.items()}, score.detach().cpu().contiguous()


def _through_the_score(problem, layer: Layer, answer, rule) -> dict[str, tuple[Tensor, Tensor]]:
    """Expected value and bound of the gradients that go through dscore."""
    layer = layer.map(Tensor.double)
    dtype = problem.query.dtype
    weight, weight_bound = torch.zeros_like(layer.weight), torch.zeros_like(layer.weight)
    A, A_bound = torch.zeros_like(layer.A), torch.zeros_like(layer.A)
    for g in range(len(layer.A)):
        value, bound = _sums_over_keys(problem, layer.columns(g), g, rule)
        A[g], A_bound[g], weight[g], weight_bound[g] = value[0], bound[0], value[1:], bound[1:]
    dscore, factor = answer.tensors["dbias"], layer.by_value()
    allowed = tiers.bound("dbias", dscore, torch.float32, rule)
    heads = problem.value.shape[2:]
    through = ((dscore.value * factor).transpose(1, 2) @ layer.weight).unflatten(-1, heads)
    allowed = (allowed + CHAIN * dscore.value.abs()) * factor.abs()
    through_bound = (allowed.transpose(1, 2) @ layer.weight.abs()).unflatten(-1, heads)
    dv = answer.tensors["dv"]
    # Autograd rounds both parts, and their sum, to the type of the values.
    bound = tiers.bound("dv", dv, dtype, rule) + through_bound
    bound += tiers.UNIT[dtype] * (dv.value.abs() + 2 * through.abs())
    return {"dv": (dv.value + through, bound), "dt_proj": (weight, weight_bound), "A": (A, A_bound)}


def _sums_over_keys(problem, columns: Tensor, g: int, rule) -> tuple[Tensor, Tensor]:
    """sum_j c_j dscore_j of key/value head g and its bound, for every column c [B, Sk, columns]."""
    group = problem.query.shape[2] // problem.key.shape[2]
    heads = slice(g * group, (g + 1) * group)
    num_columns = columns.shape[-1]

    def widened(x: Tensor, by: Tensor | None) -> Tensor:  # [B, rows, heads, D] -> [..., D + columns]
        zeros = x.new_zeros(*x.shape[:-1], num_columns, dtype=torch.float64)
        return torch.cat([x.double(), zeros if by is None else by.unsqueeze(2)], -1)

    carried = oracle.expected(
        problem.replace(
            query=widened(problem.query[:, :, heads], None),
            key=widened(problem.key[:, :, g : g + 1], columns),
            value=widened(problem.value[:, :, g : g + 1], None),
            dout=widened(problem.dout[:, :, heads], None),
            bias=problem.bias[:, g : g + 1],
            score=problem.score[:, g : g + 1],
        )
    ).tensors["dq"][..., -num_columns:]
    over_rows = (0, 1, 2)
    variance = tiers.variance(carried, rule).sum(over_rows)
    terms = carried.terms.sum(over_rows)
    bound = (Z * variance.sqrt() + CHAIN * terms) / abs(problem.scale) + 2.0**-100
    return carried.value.sum(over_rows) / problem.scale, bound


def main() -> int:
    arguments = equivalence.parse_arguments(__doc__, tuple(CASES))
    names = [DTYPE_NAMES[dtype] for dtype in equivalence.DTYPES[arguments.device]]
    checks = []
    for test_type in arguments.test_type or CASES:
        for case in CASES[test_type]:
            for dtype in names:
                typed = dataclasses.replace(case, dtype=dtype, seed=arguments.seed)
                checks.append(
                    (f"{test_type} {typed.id}", lambda typed=typed: judged(typed, arguments.device))
                )
    return equivalence.run_all(checks, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
