"""A few rows against a long cache: what a decoding step calls. Lengths stand around those at which kernels cut
the keys into splits."""

import dataclasses

import flash_dmattn
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiers
from cases import DTYPES, Case, make
from counters import count
from judge import check, failures_of, reproduction, require
from kernels import bit_for_bit
from narrowing import fit
from oracle import expected
from probe import Probe, count_exactly, make_probe, tier_a

MAX_QUERIES = 16
SPLIT = 4096
BASE = dict(
    batch=2,
    seqlen_q=3,
    seqlen_k=2 * SPLIT + 5,
    heads_q=4,
    heads_kv=2,
    head_dim=32,
    keep_window=300,
    dlse=True,
)
CASES = [
    *(
        Case(
            **(BASE | dict(seqlen_q=q, seqlen_k=k, keep_window=w, dtype=dtype, causal=causal)),
            bias="separate",
        )
        for q, k, w, dtype, causal in (
            (1, SPLIT - 1, 64, "f32", True),
            (2, SPLIT, None, "f16", True),
            (7, SPLIT + 1, 5000, "bf16", True),
            (15, SPLIT + 3, None, "f32", False),
            (16, 2 * SPLIT - 1, 1, "f64", True),
            (16, 2 * SPLIT + 1, 1000, "bf16", False),
            (17, SPLIT + 1, 64, "f32", True),
        )
    ),
    *(Case(**BASE, dtype=dtype) for dtype in DTYPES),
    *(Case(**(BASE | dict(heads_q=heads_q, heads_kv=1, batch=1)), dtype="bf16") for heads_q in (1, 7, 32)),
    Case(**(BASE | dict(head_dim=65)), score="minus_inf", dtype="f16"),
    Case(**BASE, score="disabled"),
    Case(**BASE, score="rising", bias="none"),
    Case(**BASE, score="falling", num_sinks=4, local_window=40),
    Case(**BASE, logit=300.0, scale=-0.3),
]


def with_ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@with_ids(CASES)
def test_within_bounds(kernel, case):
    check(kernel, fit(case, kernel))


@with_ids([case for case in CASES if case.score == "normal" and case.causal and case.keep_window])
def test_selection_for_the_last_rows(kernel, case):
    """It is the selection of the whole, without what they do not see."""
    problem = make(fit(case, kernel)).to(kernel.device)
    score, rows = problem.ranked_score(), case.seqlen_q
    whole = kernel.select_keys(score, case.keep_window)
    last = kernel.select_keys(score, case.keep_window, num_queries=rows)
    key = torch.arange(case.seqlen_k, dtype=torch.int32, device=kernel.device)
    assert torch.equal(last, torch.where(whole > case.seqlen_k - rows, whole, key))
    count("selection", last.numel())
    results = [kernel.forward(problem, expiry) for expiry in (whole, last)]
    assert all(bit_for_bit(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_last_rows_of_a_prefill(kernel, dtype, rows):
    case = Case(**(BASE | dict(seqlen_q=70, batch=1, dtype=dtype)))
    prefill = make(fit(case, kernel))
    last = prefill.replace(
        query=prefill.query[:, -rows:], dout=prefill.dout[:, -rows:], dlse=prefill.dlse[..., -rows:]
    )
    answer = expected(last)
    how = reproduction(kernel, case)
    for problem in (prefill, last):
        problem = problem.to(kernel.device)
        results = kernel.forward(problem, kernel.select(problem))
        results = {"out": results["out"][:, -rows:], "lse": results["lse"][..., -rows:]}
        require(tiers.judge(results, answer, last.query.dtype, kernel.keeps_float32, contiguous=()), how)


@with_ids([case for case in CASES if case.seqlen_q <= MAX_QUERIES])
def test_equal_bits(kernel, case):
    """With any number of threads, and for a batch entry alone."""
    problem = make(fit(case, kernel)).to(kernel.device)
    expiry = kernel.select(problem)
    together = kernel.forward(problem, expiry)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        again = kernel.forward(problem, expiry)
        assert all(bit_for_bit(again[name], together[name]) for name in together), f"{threads} threads"
    entry = problem.map(lambda tensor: tensor[-1:])
    alone = kernel.forward(entry, kernel.select(entry))
    assert all(bit_for_bit(alone[name], together[name][-1:]) for name in together), "alone"
    count("bitwise", 4)


@with_ids([case for case in CASES if case.keep_window == 300 and case.causal])
def test_keys_that_no_row_sees_may_hold_anything(kernel, case):
    problem = make(fit(case, kernel)).to(kernel.device)
    expiry = kernel.select(problem)
    first = torch.arange(case.seqlen_k, device=kernel.device).clamp(min=case.seqlen_k - case.seqlen_q)
    unseen = first >= expiry
    assert unseen.any()
    bias = torch.zeros_like(problem.score) if problem.bias is None else problem.bias
    before = kernel.forward(problem.replace(bias=bias, score=None), expiry)
    rows = unseen.transpose(1, 2)[..., None]
    for junk in (torch.nan, torch.inf):
        changed = problem.replace(
            key=problem.key.masked_fill(rows, junk),
            value=problem.value.masked_fill(rows, junk),
            bias=bias.masked_fill(unseen, junk),
            score=None,
        )
        after = kernel.forward(changed, expiry)
        assert all(bit_for_bit(after[name], before[name]) for name in before), f"unseen keys are {junk}"
    count("bitwise", 2)


@pytest.mark.parametrize(
    "probe",
    [
        Probe(
            dtype=dtype,
            run=run,
            keep_window=w,
            seqlen_q=q,
            seqlen_k=2 * SPLIT + 100,
            head_dim=16,
            causal=causal,
        )
        for q, w, causal in ((1, 256, True), (16, 128, True), (5, 256, False))
        for dtype in ("f32", "bf16")
        for run in (1, 2)
    ],
    ids=lambda probe: probe.id,
)
def test_structure_is_exact(kernel, probe):
    probe = fit(probe, kernel)
    problem = make_probe(probe)
    results = kernel.run(problem.to(kernel.device))
    failures = tier_a(results, count_exactly(problem), probe, kernel.keeps_float32)
    require(failures, f'python -m pytest tests/python/test_decode.py -k "{probe.id}" --kernel {kernel.name}')


@st.composite
def drawn(draw):
    heads_kv, group = (draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 8])))
    near_a_split = st.sampled_from([SPLIT, 2 * SPLIT]).flatmap(lambda n: st.integers(n - 20, n + 20))
    seqlen_k = draw(st.one_of(st.integers(2, 600), near_a_split))
    causal = draw(st.booleans())
    return Case(
        batch=draw(st.integers(1, 2)),
        seqlen_q=draw(st.integers(1, min(MAX_QUERIES, seqlen_k))),
        seqlen_k=seqlen_k,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([1, 3, 8, 16, 24, 40])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        keep_window=draw(st.sampled_from([None, 1, 33, 128, 1024, seqlen_k])),
        causal=causal,
        score=draw(
            st.sampled_from(["normal", "equal", "quantised", "rising", "minus_inf", "nan", "disabled"])
        ),
        bias=draw(st.sampled_from(["score", "separate", "none"])),
        logit=draw(st.sampled_from([1.0, 20.0])),
        num_sinks=draw(st.sampled_from([0, 0, 5])),
        local_window=draw(st.sampled_from([0, 0, 40])) if causal else 0,
        seed=draw(st.integers(0, 2**31)),
    )


@given(case=drawn())
def test_fuzz(kernel, case):
    case = fit(case, kernel)
    problem = make(case)
    failures = failures_of(kernel, problem.to(kernel.device), expected(problem), least_limit=3.0)
    require(failures, reproduction(kernel, case))
    count("fuzz")


def test_which_calls_the_cpu_kernel_takes():
    case = Case(**(BASE | dict(batch=1, seqlen_q=MAX_QUERIES, seqlen_k=40)))

    def chosen(case):
        problem = make(case)
        function = flash_dmattn.explain
        text = function(
            problem.query, problem.key, problem.value, attn_bias=problem.bias, is_causal=case.causal
        )
        return next(line for line in text.splitlines() if line.startswith("cpu:"))

    assert chosen(case) == "cpu: runs, kernel cpu decode"
    assert chosen(dataclasses.replace(case, causal=False)) == "cpu: runs, kernel cpu decode"
    for other in (dict(seqlen_q=MAX_QUERIES + 1), dict(seqlen_k=MAX_QUERIES)):
        assert chosen(dataclasses.replace(case, **other)) == "cpu: runs"
