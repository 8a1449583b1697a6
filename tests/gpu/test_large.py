"""Shapes beyond what 32 bits count and beyond what one axis of a grid holds: sampled rows against float64,
and what holds without a reference."""

import pytest
import torch

import cases
import check
import problem as benchmark_problem
from counters import count
from judge import require
from kernels import bit_for_bit
from oracle import expected
from suites import Case
from tiers import UNIT, judge

Z = 7.0


def judge_samples(kernel, case):
    """Sampled positions of every head, and sums over everything."""
    problem = benchmark_problem.make_problem(case)
    arguments = dict(dout=problem.dout, scale=case.head_dim**-0.5, keep_window=case.keep_window)
    inputs = dict(zip(("query", "key", "value", "score"), (x.detach() for x in problem.inputs())))
    given = cases.Problem(**inputs, **arguments, bias=inputs["score"])
    results = kernel.run(given) | {"expiry": kernel.select(given)}
    results["dscore"] = results.pop("dbias")
    check.check(problem, results, benchmark_problem.exact_expiry(problem), "score")
    count("property", case.batch * case.heads_kv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_than_2_to_31_elements(kernel, dtype, pytestconfig):
    """In every one of query, key, value, out and their gradients."""
    shrink = pytestconfig.getoption("--shrink")
    seqlen = 525_000 // shrink
    case = Case(1, 32, 32, seqlen, seqlen, 128, 128, dtype=dtype, device=kernel.device, backward=True)
    assert shrink > 1 or seqlen * case.heads_kv * case.head_dim > 2**31
    judge_samples(kernel, case)


def test_a_batch_stride_beyond_2_to_31(kernel, pytestconfig):
    shrink = pytestconfig.getoption("--shrink")
    seqlen = 135_000 // shrink
    case = Case(5, 32, 8, seqlen, seqlen, 128, 256, device=kernel.device, backward=True)
    assert shrink > 1 or (case.batch - 1) * seqlen * case.heads * case.head_dim > 2**31
    judge_samples(kernel, case)


def test_more_than_2_to_31_scores(kernel, pytestconfig):
    shrink = pytestconfig.getoption("--shrink")
    heads, length, window = 2100 // min(shrink, 100), (1 << 20) // shrink, 1024 // min(shrink, 100)
    assert shrink > 1 or heads * length > 2**31
    generator = torch.Generator(kernel.device).manual_seed(1)
    score = torch.randn(1, heads, length, generator=generator, device=kernel.device)
    expiry = kernel.select_keys(score, window)
    for head in (0, 1, heads // 2, heads - 2, heads - 1):
        alone = score[:, head : head + 1].cpu()
        exact = torch.ops.flash_dmattn.select(alone, window, True, 0, 0, None, -1)
        assert torch.equal(expiry[:, head : head + 1].cpu(), exact), f"head {head}"
        count("selection", length)
    born = torch.arange(length, device=kernel.device)
    for part in expiry[0].split(64):
        assert ((part >= born) & (part <= length)).all()
        # Of the keys that are visible in the end there are exactly w.
        assert ((part == length).sum(-1) == min(window, length)).all()
        count("property", len(part))


def sums_hold(problem, results):
    """sum_j dv_j = sum_i dout_i and sum_j dbias_j = 0 in every batch entry and key/value head."""
    unit = UNIT[problem.query.dtype]
    group = problem.query.shape[2] // problem.key.shape[2]
    dout = problem.dout.double().unflatten(2, (-1, group))
    dv, dbias = results["dv"].double(), results["dbias"].double()
    wanted = dout.sum((1, 3))
    allowed = Z * unit * (dout.square().sum((1, 3)) + dv.square().sum(1)).sqrt() + 2.0**-20 * dout.abs().sum(
        (1, 3)
    )
    assert ((dv.sum(1) - wanted).abs() <= allowed).all()
    # A row's dS sums to what its delta is wrong by: the rounding of its output and of P.
    value = problem.value.double().abs().amax(1).unsqueeze(1).unsqueeze(3)
    rows = (dout.square() * value.square()).sum((1, 3, 4)) * unit**2
    assert (dbias.sum(-1).abs() <= Z * rows.sqrt() + 2.0**-20 * dbias.abs().sum(-1)).all()
    count("property", wanted.numel() + rows.numel())


def agrees_with_parts(kernel, case, batch=None, heads_kv=None):
    """A problem of many entries against the same entries in a call of their own, bit for bit, and those
    against the oracle. batch, heads_kv: the entries looked at."""
    problem = cases.make(case)
    whole = kernel.run(problem.to(kernel.device))
    sums_hold(problem.to(kernel.device), whole)
    batch = torch.arange(case.batch) if batch is None else torch.tensor(batch)
    heads_kv = torch.arange(case.heads_kv) if heads_kv is None else torch.tensor(heads_kv)
    group = case.heads_q // case.heads_kv
    heads_q = (heads_kv[:, None] * group + torch.arange(group)).flatten()

    def cut(name, tensor):
        heads = heads_q if name in ("query", "dout", "out", "dq", "lse", "dlse") else heads_kv
        axis = 1 if name in ("lse", "dlse", "bias", "score", "dbias") else 2
        return tensor.index_select(0, batch.to(tensor.device)).index_select(axis, heads.to(tensor.device))

    tensors = {name: cut(name, x) for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}
    part = problem.replace(**tensors)
    alone = kernel.run(part.to(kernel.device))
    for name, tensor in alone.items():
        assert bit_for_bit(tensor, cut(name, whole[name])), f"{name} of single entries has other bits"
        count("bitwise")
    failures = judge(alone, expected(part), part.query.dtype, kernel.keeps_float32, kernel.contiguous, 3.0)
    require(failures, f"pytest tests/gpu/test_large.py --kernel {kernel.name}  # {case!r}")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_more_than_65535_batch_entries(kernel, dtype, pytestconfig):
    number = 66_000 // pytestconfig.getoption("--shrink")
    case = cases.Case(number, 20, 20, 2, 1, 32, dtype, keep_window=8, dlse=False)
    agrees_with_parts(kernel, case, batch=[0, 1, number // 2, number - 2, number - 1])


@pytest.mark.parametrize("group", [1, 3])
def test_more_than_65535_heads(kernel, group, pytestconfig):
    number = 66_000 // pytestconfig.getoption("--shrink")
    case = cases.Case(1, 20, 20, group * number, number, 32, "bf16", keep_window=8)
    agrees_with_parts(kernel, case, heads_kv=[0, 1, number // 2, number - 2, number - 1])


def test_more_than_65535_packed_sequences(kernel, pytestconfig):
    """Each is what it is in a batch."""
    number = 66_000 // pytestconfig.getoption("--shrink")
    length = 12
    case = cases.Case(number, length, length, 2, 1, 64, "bf16", keep_window=5)
    problem = cases.make(case).to(kernel.device)
    by_batch = kernel.run(problem)
    bounds = torch.arange(0, length * (number + 1), length, dtype=torch.int32, device=kernel.device)
    packed = {name: getattr(problem, name).flatten(0, 1) for name in ("query", "key", "value", "dout")}
    packed |= {name: getattr(problem, name).transpose(1, 2).flatten(0, 1) for name in ("bias", "score")}
    results = kernel.run(problem.replace(**packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds))
    for name, tensor in results.items():
        wanted = by_batch[name]
        if name == "lse":
            wanted = wanted.transpose(0, 1).flatten(1)
        else:
            wanted = (wanted.transpose(1, 2) if name == "dbias" else wanted).flatten(0, 1)
        assert bit_for_bit(tensor, wanted), f"{name} of packed sequences has other bits"
        count("bitwise")
