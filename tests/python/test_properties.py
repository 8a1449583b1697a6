"""The identities of properties.py over shapes and types, and on sequences too long for an oracle."""

import pytest
import torch

from cases import Case, make
from judge import reproduction, require
from narrowing import fit
from properties import all_properties, output_range, sums_of_gradients

SMALL = dict(batch=2, seqlen_q=150, seqlen_k=200, heads_q=4, heads_kv=2, head_dim=64, keep_window=32)
CASES = (
    [
        Case(**SMALL, dtype=dtype, bias=bias, score=score, causal=causal, dlse=dlse)
        for dtype in ("f64", "f32", "bf16", "f16")
        for bias, score, causal, dlse in (
            ("score", "normal", True, True),
            ("separate", "minus_inf", True, False),
            ("none", "nan", False, True),
            ("score", "two_values", False, False),
            ("score", "disabled", True, True),
        )
    ]
    + [
        Case(
            lengths=((3, 5), (0, 0), (70, 70), (0, 4), (90, 130)),
            heads_q=6,
            heads_kv=2,
            head_dim=40,
            dtype=dtype,
            dlse=True,
        )
        for dtype in ("f64", "f32", "bf16", "f16")
    ]
    + [Case(**(SMALL | dict(keep_window=None)), bias="separate", dtype=dtype) for dtype in ("f32", "bf16")]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_identities(kernel, case):
    problem = make(case).to(kernel.device)
    require(all_properties(kernel, problem, kernel.run(problem)), reproduction(kernel, case))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_identities_on_a_long_sequence(kernel, dtype):
    case = Case(
        seqlen_q=40_000, seqlen_k=40_000, heads_q=2, heads_kv=1, head_dim=64, keep_window=256, dtype=dtype
    )
    problem = make(case).to(kernel.device)
    results = kernel.run(problem)
    require(
        sums_of_gradients(kernel, problem, results) + output_range(kernel, problem, results),
        reproduction(kernel, case),
    )
    assert all(torch.isfinite(result).all() for result in results.values())


@pytest.mark.slow
def test_identities_on_a_million_tokens(kernel):
    case = Case(seqlen_q=1_000_000, seqlen_k=1_000_000, heads_q=1, heads_kv=1, head_dim=16, keep_window=32)
    problem = make(fit(case, kernel)).to(kernel.device)
    results = kernel.run(problem)
    require(
        sums_of_gradients(kernel, problem, results) + output_range(kernel, problem, results),
        reproduction(kernel, case),
    )
