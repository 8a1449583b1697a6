"""Where the operation becomes another one that is known: a copy, dense attention, multi-head attention, a
decode step."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ranking
import tiers
from cases import DTYPES, INT32_MAX, Case, make
from counters import count
from judge import reproduction, require
from kernels import bit_for_bit
from oracle import expected
from tiers import Rule

BASE = dict(batch=2, seqlen_q=150, seqlen_k=150, heads_q=4, heads_kv=2, head_dim=32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_one_copies_the_best_value(kernel, dtype, causal):
    problem = make(Case(**BASE, dtype=dtype, keep_window=1, causal=causal, score="quantised"))
    best = (
        torch.from_numpy(ranking.visible(problem.score.double().flatten(0, 1).numpy(), 1, causal))
        .int()
        .argmax(-1)
    )
    best = (
        best.unflatten(0, (2, 2)).repeat_interleave(2, 1).transpose(1, 2)
    )  # [B, Sq, H]: the key that each row sees
    problem = problem.to(kernel.device)
    out = kernel.forward(problem, kernel.select(problem))["out"].cpu()
    value = problem.value.cpu().repeat_interleave(2, 2)
    assert bit_for_bit(out, value.gather(1, best[..., None].expand_as(value)))
    count("bitwise")


def sdpa(problem, visible=None):
    """PyTorch's math backend in float64, with the bias as a dense float mask: out and gradients."""
    leaves = {
        name: getattr(problem, name).detach().double().requires_grad_()
        for name in ("query", "key", "value", "bias")
    }
    group = problem.query.shape[2] // problem.key.shape[2]
    (seqlen_q, seqlen_k) = problem.query.shape[1], problem.key.shape[1]
    mask = leaves["bias"].repeat_interleave(group, 1)[:, :, None].expand(-1, -1, seqlen_q, -1)
    if problem.causal:
        future = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=mask.device).triu(
            1 + seqlen_k - seqlen_q
        )
        mask = mask.masked_fill(future, -torch.inf)
    if visible is not None:
        mask = mask.masked_fill(~visible.repeat_interleave(group, 1), -torch.inf)
    query, key, value = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=problem.scale, enable_gqa=True
        )
    out = out.transpose(1, 2)
    grads = torch.autograd.grad(out, list(leaves.values()), problem.dout.double())
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dbias"), grads))}


def assert_close_in_float64(actual, wanted, terms):
    for name, reference in wanted.items():
        error = (actual[name].double() - reference).abs().cpu()
        allowed = 1e-12 * (1 + terms.tensors[name].terms + terms.tensors[name].exact.sqrt() / 2.0**-21)
        assert (error <= allowed).all(), (
            f"{name}: off by {float((error - allowed).max()):.3g} more than allowed"
        )
        count("tier B", error.numel())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep_window", [None, 150, 151, INT32_MAX])
def test_a_window_beyond_the_sequence_is_dense_attention(kernel, keep_window, causal):
    if "f64" not in kernel.dtypes:
        pytest.skip("compares in float64")
    case = Case(**BASE, dtype="f64", keep_window=keep_window, causal=causal, bias="separate")
    problem = make(case)
    on_device = problem.to(kernel.device)
    assert_close_in_float64(kernel.run(on_device), sdpa(on_device), expected(problem))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", ["normal", "two_values"])
def test_a_window_is_dense_attention_under_the_mask_it_stands_for(kernel, score, causal):
    """The mask as people build it: by definition, N x N."""
    if "f64" not in kernel.dtypes:
        pytest.skip("compares in float64")
    case = Case(
        **(BASE | dict(seqlen_q=100)),
        dtype="f64",
        keep_window=20,
        causal=causal,
        score=score,
        bias="separate",
    )
    problem = make(case)
    by_position = ranking.visible(problem.score.flatten(0, 1).numpy(), 20, causal)
    visible = torch.from_numpy(by_position).unflatten(0, (2, 2))[:, :, -100:].to(kernel.device)
    on_device = problem.to(kernel.device)
    assert_close_in_float64(kernel.run(on_device), sdpa(on_device, visible), expected(problem))


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("group", [2, 5])
def test_a_group_equals_expanded_heads(kernel, group, dtype):
    case = Case(**(BASE | dict(heads_q=2 * group)), dtype=dtype, keep_window=32)
    problem = make(case)
    answer = expected(problem)
    spread = {
        name: getattr(problem, name).repeat_interleave(group, axis)
        for name, axis in (("key", 2), ("value", 2), ("bias", 1), ("score", 1))
    }
    many = kernel.run(problem.replace(**spread).to(kernel.device))
    for name, axis in (("dk", 2), ("dv", 2), ("dbias", 1)):
        many[name] = many[name].unflatten(axis, (2, group)).sum(axis + 1)
    # Summed, the gradients of the many have been rounded each by itself.
    least_limit = 1.0 if dtype in ("f64", "f32") else 1.5
    require(
        tiers.judge(many, answer, problem.query.dtype, kernel.keeps_float32, least_limit=least_limit),
        reproduction(kernel, case),
    )
    grouped = kernel.run(problem.to(kernel.device))
    if kernel.keeps_float32:  # the tiles of rows of the others, and with them the order of sums, follow the group
        for name in ("out", "lse", "dq"):
            assert bit_for_bit(grouped[name], many[name]), name
    else:
        require(
            tiers.judge(grouped, answer, problem.query.dtype, kernel.keeps_float32),
            reproduction(kernel, case),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_row_of_a_prefill_is_the_decode_step(kernel, dtype):
    case = Case(**(BASE | dict(seqlen_q=1)), dtype=dtype, keep_window=32, dlse=True)
    decode = make(case)
    answer = expected(decode)
    prefix = make(dataclasses.replace(case, seqlen_q=149, seed=1))
    whole = decode.replace(
        query=torch.cat([prefix.query, decode.query], 1),
        dout=torch.cat([torch.zeros_like(prefix.dout), decode.dout], 1),
        dlse=torch.cat([torch.zeros_like(prefix.dlse), decode.dlse], 2),
    )
    results = kernel.run(whole.to(kernel.device))
    results |= {"out": results["out"][:, -1:], "dq": results["dq"][:, -1:], "lse": results["lse"][..., -1:]}
    require(
        tiers.judge(results, answer, decode.query.dtype, kernel.keeps_float32, contiguous=()),
        reproduction(kernel, case),
    )


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_partial_results_merge_by_their_lse(kernel, dtype):
    """Two halves of the keys, merged as docs/math.md says, are the whole; gradients flow through both lse."""
    case = Case(**(BASE | dict(seqlen_q=1)), dtype=dtype, keep_window=None, bias="separate", causal=False)
    problem = make(case)
    answer = expected(problem)
    on_device = problem.to(kernel.device)
    halves = [
        on_device.replace(
            key=on_device.key[:, part], value=on_device.value[:, part], bias=on_device.bias[..., part]
        )
        for part in (slice(0, 70), slice(70, None))
    ]
    runs = [kernel.forward(half, None) for half in halves]
    lse = torch.logaddexp(*(run["lse"] for run in runs))
    weights = [torch.exp(run["lse"] - lse) for run in runs]
    out = sum(w.transpose(1, 2)[..., None] * run["out"].to(lse.dtype) for w, run in zip(weights, runs))
    slack = Rule("merged", 2.0**-8, 2.0**-20, tiers.UNIT[problem.query.dtype])
    error = (out.cpu().double() - answer.tensors["out"].value).abs()
    assert (error <= 2 * tiers.bound("out", answer.tensors["out"], problem.query.dtype, slack)).all()
    # Through the merge, each half gets dout and dlse; together their gradients are those of the whole.
    grads = []
    for half, run, weight in zip(halves, runs, weights):
        w = weight.transpose(1, 2)[..., None]
        dlse = (on_device.dout * (run["out"] - out)).sum(-1).transpose(1, 2).to(lse.dtype) * weight
        half = half.replace(dout=(on_device.dout * w).to(on_device.dout.dtype), dlse=dlse)
        grads.append(kernel.backward(half, None, run["out"], run["lse"]))
    together = {
        name: torch.cat([grad[name] for grad in grads], axis)
        for name, axis in (("dk", 1), ("dv", 1), ("dbias", 2))
    }
    together["dq"] = grads[0]["dq"].double() + grads[1]["dq"].double()
    scale = {"f64": 1e-13, "f32": 1e-6, "bf16": 2e-2, "f16": 2.5e-3}[dtype]
    for name, grad in together.items():
        reference = answer.tensors[name]
        size = (reference.terms + reference.exact.sqrt() / 2.0**-21).max()
        assert ((grad.cpu().double() - reference.value).abs() <= scale * size).all(), name
        count("tier B", grad.numel())
