"""Tiers B and C (and exact selection) over shapes, types, windows and scores; P12, P4.

The table spans what a kernel may treat differently: tile borders, groups that do not divide a tile, head dims
that are no multiple of a vector, windows about the tile and about the sequence, several segments of the plan.
"""

import pytest
import torch

from cases import INT32_MAX, Case, make
from judge import check, failures_of, require
from oracle import expected

DTYPES = ("f64", "f32", "bf16", "f16")
BASE = dict(batch=2, seqlen_q=130, seqlen_k=200, heads_q=4, heads_kv=2, head_dim=64, keep_window=32)


def cases(**axes):
    return [Case(**(BASE | change)) for change in _product(axes)]


def _product(axes):
    combinations = [{}]
    for name, values in axes.items():
        combinations = [chosen | {name: value} for chosen in combinations for value in values]
    return combinations


TABLES = {
    "scores": cases(
        dtype=("f32", "bf16"),
        causal=(True, False),
        score=(
            "normal",
            "equal",
            "two_values",
            "quantised",
            "rising",
            "falling",
            "signed_zero",
            "minus_inf",
            "nan",
            "denormal",
            "disabled",
        ),
    ),
    "biases": cases(
        dtype=DTYPES, causal=(True, False), bias=("score", "separate", "none"), dlse=(True, False)
    ),
    "plain": cases(keep_window=(None,), dtype=DTYPES, causal=(True, False), bias=("separate", "none")),
    "windows": cases(
        seqlen_k=(300,),
        seqlen_q=(300,),
        batch=(1,),
        dtype=("f32",),
        keep_window=(
            1,
            2,
            31,
            32,
            33,
            63,
            64,
            65,
            127,
            128,
            129,
            255,
            256,
            257,
            299,
            300,
            301,
            1024,
            INT32_MAX,
        ),
    ),
    "windows, full": cases(
        causal=(False,), batch=(1,), dtype=("f16",), keep_window=(1, 33, 64, 199, 200, 201, INT32_MAX)
    ),
    "head dims": cases(
        head_dim=(1, 2, 3, 7, 8, 16, 31, 33, 48, 72, 80, 96, 128, 160, 192, 256, 260),
        batch=(1,),
        dtype=("f32", "bf16"),
        dlse=(True,),
    ),
    "groups": [
        Case(**(BASE | dict(heads_q=group * heads_kv, heads_kv=heads_kv, batch=1, dtype=dtype, head_dim=32)))
        for group, heads_kv in ((1, 1), (1, 5), (2, 1), (3, 2), (4, 2), (5, 1), (7, 1), (8, 2), (16, 1))
        for dtype in ("f32", "bf16")
    ],
    "lengths": [
        Case(**(BASE | dict(seqlen_q=q, seqlen_k=k, batch=batch, head_dim=32, causal=causal, keep_window=16)))
        for q, k in (
            (1, 1),
            (1, 2),
            (1, 300),
            (2, 2),
            (2, 65),
            (3, 3),
            (7, 7),
            (7, 64),
            (15, 16),
            (16, 16),
            (17, 17),
            (31, 32),
            (33, 33),
            (63, 64),
            (64, 64),
            (65, 65),
            (127, 129),
            (128, 128),
            (129, 129),
            (100, 257),
            (256, 256),
            (257, 257),
        )
        for batch in (1,)
        for causal in (True, False)
    ],
    "fewer keys": cases(causal=(False,), seqlen_q=(70,), seqlen_k=(1, 5, 64), dtype=("f32", "f16")),
    "batches": cases(batch=(0, 1, 3, 8), seqlen_q=(20,), seqlen_k=(40,)),
    "scales": cases(scale=(0.0, 1.0, -0.3), dtype=("f64", "f32", "bf16"), logit=(2.0,), dlse=(True,)),
    "logits": cases(logit=(30.0, 300.0, 3000.0), dtype=DTYPES, bias=("score", "none"), dlse=(True,)),
    "score types": cases(score_dtype=DTYPES, dtype=("f32", "bf16"), bias=("score", "none")),
    "sinks and local": [
        Case(**(BASE | dict(num_sinks=sinks, local_window=local, causal=causal, score=score)))
        for sinks, local, causal in (
            (3, 0, True),
            (0, 20, True),
            (4, 33, True),
            (500, 0, True),
            (0, INT32_MAX, True),
            (5, 0, False),
        )
        for score in ("falling", "minus_inf")
    ],
    "packed": [
        Case(
            lengths=lengths,
            heads_q=6,
            heads_kv=2,
            head_dim=64,
            keep_window=w,
            dtype=dtype,
            causal=causal,
            bias=bias,
            dlse=True,
        )
        for lengths, causal in (
            (((64, 64), (1, 1), (130, 130), (17, 200)), True),
            (((0, 0), (3, 9), (0, 5), (40, 40), (0, 0)), True),
            (((5, 5),), True),
            (((0, 0),), True),
            (((70, 3), (5, 90), (4, 0), (0, 4)), False),
        )
        for dtype, w, bias in (
            ("f32", 16, "score"),
            ("bf16", 64, "separate"),
            ("f64", 16, "none"),
            ("f32", None, "separate"),
        )
    ],
    "long": [
        Case(
            seqlen_q=2500,
            seqlen_k=2500,
            heads_q=2,
            heads_kv=1,
            head_dim=32,
            keep_window=256,
            score="quantised",
        ),
        Case(seqlen_q=4097, seqlen_k=4097, heads_q=2, heads_kv=1, head_dim=32, keep_window=64, dtype="bf16"),
        Case(
            seqlen_q=4097,
            seqlen_k=4097,
            heads_q=1,
            heads_kv=1,
            head_dim=64,
            keep_window=1024,
            score="falling",
        ),
        Case(seqlen_q=1, seqlen_k=4097, heads_q=4, heads_kv=2, head_dim=64, keep_window=1024, dtype="f16"),
        Case(
            seqlen_q=700,
            seqlen_k=4500,
            heads_q=2,
            heads_kv=1,
            head_dim=64,
            keep_window=2500,
            dtype="bf16",
            dlse=True,
        ),
        Case(
            seqlen_q=2300,
            seqlen_k=4200,
            heads_q=2,
            heads_kv=2,
            head_dim=16,
            keep_window=None,
            bias="separate",
        ),
        Case(seqlen_q=300, seqlen_k=3000, heads_q=2, heads_kv=1, head_dim=64, keep_window=1024, causal=False),
    ],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{name}-{case.id}") for name, table in TABLES.items() for case in table]
)
def test_within_bounds(kernel, case):
    if case.dtype not in kernel.dtypes:
        pytest.skip(f"{kernel.name} takes no {case.dtype}")
    check(kernel, case)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_expiry(kernel, dtype, packed, causal):
    """The caller's own selection, with no ranks behind it: any integers are intervals."""
    lengths = ((100, 130), (0, 7), (70, 70)) if packed else None
    case = Case(
        **(
            BASE
            | dict(keep_window=None, lengths=lengths, dtype=dtype, causal=causal, bias="separate", dlse=True)
        )
    )
    problem = make(case)
    generator = torch.Generator().manual_seed(5)
    expiry = torch.randint(-20, 230, problem.bias.shape, generator=generator, dtype=torch.int32)
    extreme = torch.rand(expiry.shape, generator=generator)
    expiry[extreme < 0.05], expiry[extreme > 0.95] = -(2**31), INT32_MAX
    problem = problem.replace(fixed_expiry=expiry)
    require(failures_of(kernel, problem.to(kernel.device), expected(problem)), f"test_any_expiry: {case!r}")
