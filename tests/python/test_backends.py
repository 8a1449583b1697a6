"""The other backends, and every form of mask and bias, against the oracle and against each other."""

import inspect
import itertools

import flash_dmattn
import pytest
import torch
from flash_dmattn import flash_dmattn_func, flash_dmattn_varlen_func

import ranking
import tiers
from cases import Case, make
from counters import count
from judge import KERNELS, failures_of, reproduction, require
from kernels import bit_for_bit, forced
from oracle import expected

BASE = dict(batch=2, seqlen_q=40, seqlen_k=70, heads_q=4, heads_kv=2, head_dim=16, keep_window=16)
CASES = (
    [
        Case(**BASE, dtype=dtype, bias=bias, score=score, causal=causal)
        for dtype in ("f64", "f32", "bf16", "f16")
        for bias, score, causal in (
            ("score", "normal", True),
            ("separate", "minus_inf", True),
            ("none", "two_values", False),
            ("score", "nan", False),
            ("score", "disabled", True),
        )
    ]
    + [
        Case(**(BASE | dict(keep_window=None)), bias=bias, causal=causal)
        for bias in ("none", "separate")
        for causal in (True, False)
    ]
    + [
        Case(
            lengths=((5, 9), (0, 0), (33, 33), (0, 4)),
            heads_q=4,
            heads_kv=2,
            head_dim=16,
            keep_window=8,
            dtype=dtype,
        )
        for dtype in ("f64", "f32", "bf16")
    ]
    + [Case(**BASE, num_sinks=2, local_window=5, score="falling")]
)


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_agrees_with_the_oracle(kernel, backend, case):
    judged = KERNELS[f"{backend}-{kernel.device}"]
    problem = make(case)
    with torch.set_grad_enabled(judged.has_backward):
        require(failures_of(judged, problem.to(kernel.device), expected(problem)), reproduction(judged, case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_public_function_agrees_with_the_oracle(kernel, case):
    judged = KERNELS[f"public-{kernel.device}"]
    problem = make(case)
    require(failures_of(judged, problem.to(kernel.device), expected(problem)), reproduction(judged, case))


def run(backend=None, **arguments):
    """out, lse and the gradients of what requires one."""
    leaves = {
        name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
        if isinstance(tensor, torch.Tensor)
    }
    function = flash_dmattn_varlen_func if "cu_seqlens_q" in arguments else flash_dmattn_func
    with forced(backend):
        out, lse = function(**(arguments | leaves), return_lse=True)
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and name != "attn_score"}
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def assert_equal_bits(first, second):
    for name in second:
        assert bit_for_bit(first[name], second[name]), name
        count("bitwise")


def assert_close(first, second):
    """Float64 through two implementations."""
    for name in second:
        torch.testing.assert_close(
            first[name], second[name], rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
        count("property", first[name].numel())


@pytest.fixture
def tensors(kernel):
    problem = make(Case(**BASE, dtype="f64")).to(kernel.device)
    return dict(query=problem.query, key=problem.key, value=problem.value), problem.score


DENSE_FORMS = ["B H Sq Sk", "B Hkv Sq Sk", "B 1 Sq Sk", "1 H Sq Sk", "1 1 Sq Sk", "B H 1 Sk", "1 H 1 Sk"]
KEY_FORMS = ["B Hkv Sk", "1 Hkv Sk", "B 1 Sk", "1 1 Sk", "B Hkv 1 Sk", "1 1 1 Sk"]
SIZES = {"B": 2, "H": 4, "Hkv": 2, "Sq": 40, "Sk": 70, "1": 1}


def shape_of(form):
    return [SIZES[axis] for axis in form.split()]


def judge_public(kernel, problem, form, **forms):
    """flash_dmattn_func with attn_bias or attn_mask in a form, against the oracle, which knows a dense one."""
    on_device = problem.to(kernel.device)
    leaves = [tensor.requires_grad_() for tensor in (on_device.query, on_device.key, on_device.value)]
    out, lse = flash_dmattn_func(*leaves, is_causal=problem.causal, return_lse=True, **forms)
    bias = [form for form in forms.values() if form.requires_grad]
    grads = torch.autograd.grad(out, leaves + bias, on_device.dout)
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "dbias"), grads))}
    answer = expected(problem)
    if bias:
        results["dbias"] = results["dbias"].reshape(answer.tensors["dbias"].value.shape)
    require(tiers.judge(results, answer, torch.float64, True, ("out", "lse")), f"form [{form}]")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", DENSE_FORMS + KEY_FORMS)
def test_every_bias_form_against_the_oracle(kernel, form, causal):
    problem = make(Case(**(BASE | dict(keep_window=None)), bias="none", causal=causal, dtype="f64"))
    bias = torch.randn(shape_of(form), dtype=torch.float64)
    bias = bias.masked_fill(torch.rand(bias.shape) < 0.1, -torch.inf)
    whole = bias if bias.dim() == 4 else bias[:, :, None]
    judge_public(kernel, problem.replace(bias=whole), form, attn_bias=bias.to(kernel.device).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", DENSE_FORMS + KEY_FORMS + ["B Sk", "1 Sk"])
def test_every_mask_form_against_the_oracle(kernel, form, dtype):
    problem = make(Case(**(BASE | dict(keep_window=None)), bias="none", dtype="f64"))
    mask = torch.rand(shape_of(form)) < 0.6
    whole = {2: lambda: mask[:, None, None], 3: lambda: mask[:, :, None], 4: lambda: mask}[mask.dim()]()
    judge_public(kernel, problem.replace(mask=whole), form, attn_mask=mask.to(dtype).to(kernel.device))


def test_a_masked_key_takes_no_place_in_the_window(kernel, tensors):
    qkv, score = tensors
    mask = torch.rand(2, 70, device=kernel.device) < 0.6
    masked = run(**qkv, attn_bias=score, attn_mask=mask, keep_window_size=16, is_causal=True)
    hidden = score.masked_fill(~mask[:, None], -torch.inf)
    by_score = run(**qkv, attn_bias=score, attn_score=hidden, keep_window_size=16, is_causal=True)
    assert_equal_bits(masked, by_score)
    expiry = ranking.expiry(hidden, 16, True).to(kernel.device)
    assert_equal_bits(run(**qkv, attn_bias=score, expiry=expiry, is_causal=True), masked)


def test_a_bias_of_minus_infinity_disables_its_key(kernel, tensors):
    qkv, score = tensors
    disabled = torch.rand(score.shape, device=kernel.device) < 0.3
    bias = torch.zeros_like(score).masked_fill(disabled, -torch.inf)
    by_bias = run(**qkv, attn_bias=bias, attn_score=score, keep_window_size=16, is_causal=True)
    expiry = ranking.expiry(score.masked_fill(disabled, -torch.inf), 16, True).to(kernel.device)
    by_expiry = run(**qkv, attn_bias=torch.zeros_like(score), expiry=expiry, is_causal=True)
    assert_close({name: by_bias[name] for name in by_expiry}, by_expiry)
    assert (by_bias["dattn_bias"][disabled] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_expiry_and_a_dense_mask_intersect(kernel, tensors, causal):
    """The way out that the error message names."""
    qkv, score = tensors
    mask = torch.rand(2, 4, 40, 70, device=kernel.device) < 0.7
    expiry = flash_dmattn.select_keys(score, 16, is_causal=causal)
    both = run(**qkv, attn_bias=score, attn_mask=mask, expiry=expiry, is_causal=causal)
    sees = torch.from_numpy(ranking.visible(score.flatten(0, 1).cpu().numpy(), 16, causal)).unflatten(
        0, (2, 2)
    )
    sees = sees[:, :, -40:].repeat_interleave(2, 1).to(kernel.device) & mask
    assert_close(both, run(**qkv, attn_bias=score, attn_mask=sees, is_causal=causal))


BROADCAST = list(itertools.product(["attn_bias", "attn_score", "expiry"], ["B Hkv Sk", "1 Hkv Sk", "B 1 Sk"]))
BROADCAST += [("attn_bias", "B Hkv 1 Sk"), ("attn_score", "B Hkv 1 Sk")]


@pytest.mark.parametrize("which, form", BROADCAST)
def test_broadcast_key_forms(kernel, tensors, form, which):
    qkv, score = tensors
    part = score.narrow(0, 0, shape_of(form)[0]).narrow(1, 0, shape_of(form)[1])
    whole = part.expand(2, 2, 70).contiguous()
    part = part[:, :, None] if "1 Sk" in form and len(form.split()) == 4 else part
    if which == "expiry":
        calls = [
            dict(attn_bias=score, expiry=ranking.expiry(t, 16, True).to(kernel.device)) for t in (part, whole)
        ]
    else:
        extra = dict(attn_bias=score) if which == "attn_score" else {}
        calls = [{which: t, "keep_window_size": 16} | extra for t in (part, whole)]
    first, second = (run(**qkv, **call, is_causal=True) for call in calls)
    if which == "attn_bias":
        second["dattn_bias"] = (
            second["dattn_bias"].sum_to_size(part.reshape(*part.shape[:2], 70).shape).view_as(part)
        )
        assert_close(first, second)
    else:
        assert_equal_bits(first, second)


def test_packed_masks(kernel):
    problem = make(
        Case(
            lengths=((9, 9), (0, 4), (33, 40)), heads_q=4, heads_kv=2, head_dim=16, keep_window=8, dtype="f64"
        )
    )
    problem = problem.to(kernel.device)
    mask = torch.rand(53, device=kernel.device) < 0.6
    packed = dict(
        query=problem.query,
        key=problem.key,
        value=problem.value,
        cu_seqlens_q=problem.cu_seqlens_q,
        cu_seqlens_k=problem.cu_seqlens_k,
        is_causal=True,
        attn_bias=problem.score,
    )
    hidden = problem.score.masked_fill(~mask[:, None], -torch.inf)
    windowed = run(**packed, keep_window_size=8, attn_mask=mask)
    assert_equal_bits(run(**packed, keep_window_size=8, attn_score=hidden), windowed)
    assert_equal_bits(run(**packed, keep_window_size=8, attn_mask=mask[:, None].expand(53, 2)), windowed)
    plain = run(**packed, attn_mask=mask)
    assert_close(run("reference", **packed, attn_mask=mask), plain)
    assert_close(
        run(**(packed | dict(attn_bias=hidden))), {name: plain[name] for name in ("out", "lse", "dquery")}
    )


def test_max_seqlens_change_nothing(kernel):
    problem = make(Case(lengths=((9, 9), (20, 30)), heads_q=4, heads_kv=2, head_dim=16)).to(kernel.device)
    packed = dict(
        query=problem.query,
        key=problem.key,
        value=problem.value,
        cu_seqlens_q=problem.cu_seqlens_q,
        cu_seqlens_k=problem.cu_seqlens_k,
        is_causal=True,
    )
    for limits in (dict(max_seqlen_q=20, max_seqlen_k=30), dict(max_seqlen_q=999, max_seqlen_k=999)):
        assert_equal_bits(run(**packed, **limits), run(**packed))


def test_aliases(kernel, tensors):
    qkv, score = tensors
    wanted = flash_dmattn_func(*qkv.values(), attn_bias=score, keep_window_size=16, is_causal=True)
    for names in itertools.product("q query".split(), "k key".split(), "v value".split()):
        named = dict(zip(names, qkv.values()))
        assert bit_for_bit(
            flash_dmattn_func(**named, attn_bias=score, keep_window_size=16, is_causal=True), wanted
        )
        count("bitwise")


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 4, 2), (2, 0, 5, 4, 2), (2, 0, 0, 4, 2), (2, 3, 5, 0, 0), (2, 3, 5, 0, 2)]
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_zero_sizes(kernel, backend, shape):
    batch, seqlen_q, seqlen_k, heads_q, heads_kv = shape
    query = torch.randn(batch, seqlen_q, heads_q, 8, device=kernel.device)
    key = torch.randn(batch, seqlen_k, heads_kv, 8, device=kernel.device)
    score = torch.randn(batch, heads_kv, seqlen_k, device=kernel.device)
    results = run(
        backend, query=query, key=key, value=key.clone(), attn_bias=score, keep_window_size=2, is_causal=True
    )
    assert results["out"].shape == query.shape and results["lse"].shape == (batch, heads_q, seqlen_q)
    for name, like in (("query", query), ("key", key), ("value", key), ("attn_bias", score)):
        assert results[f"d{name}"].shape == like.shape and (results[f"d{name}"] == 0).all()
    for heads in {1, heads_kv, heads_q}:
        dense = torch.randn(1, heads, seqlen_q, seqlen_k, device=kernel.device)
        arguments = dict(query=query, key=key, value=key, attn_bias=dense, attn_mask=dense > 0)
        results = run(backend, **arguments, is_causal=True)
        assert (results["out"].shape, results["dattn_bias"].shape) == (query.shape, dense.shape)
        assert (results["dattn_bias"] == 0).all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_keys_at_all(kernel, backend):
    query, key = torch.randn(2, 3, 4, 8, device=kernel.device), torch.randn(2, 0, 2, 8, device=kernel.device)
    results = run(backend, query=query, key=key, value=key)
    assert (
        (results["out"] == 0).all()
        and (results["lse"] == -torch.inf).all()
        and (results["dquery"] == 0).all()
    )


def test_names_of_the_backends(kernel):
    names = flash_dmattn.get_available_backends()
    assert names == [name for name in ("cuda", "cpu", "flex", "reference") if name in names]
    assert {"cpu", "flex", "reference"} <= set(names)
    for name in names:
        assert callable(flash_dmattn.flash_dmattn_func_auto(name))


def test_explain_says_what_runs(kernel, tensors, monkeypatch):
    qkv, score = tensors
    lines = flash_dmattn.explain(**qkv, attn_bias=score, keep_window_size=16, is_causal=True).splitlines()
    assert (
        any(line.startswith(f"{kernel.device}: runs") for line in lines)
        and sum(": runs" in line for line in lines) >= 1
    )
    mask = torch.ones(2, 4, 40, 70, dtype=torch.bool, device=kernel.device)
    dense_lines = flash_dmattn.explain(**qkv, attn_mask=mask).splitlines()
    assert any(line.startswith(f"{kernel.device}: runs") for line in dense_lines)
    assert "reference: runs" in flash_dmattn.explain(**qkv, backend="reference").splitlines()
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "reference")
    assert "reference: runs" in flash_dmattn.explain(**qkv).splitlines()


def test_the_environment_forces_a_backend(kernel, tensors):
    qkv, score = tensors
    with forced("reference"):
        first = flash_dmattn_func(**qkv, attn_bias=score, keep_window_size=16, is_causal=True)
    second = flash_dmattn.flash_dmattn_func_auto("reference")(
        **qkv, attn_bias=score, keep_window_size=16, is_causal=True
    )
    assert bit_for_bit(first, second)
    count("bitwise")


def test_signatures():
    """The public surface, by name and order."""
    names = list(inspect.signature(flash_dmattn_func).parameters)
    assert names[:7] == ["query", "key", "value", "attn_mask", "attn_bias", "scale", "is_causal"]
    assert names[7:12] == ["keep_window_size", "attn_score", "expiry", "return_lse", "validate"]
    names = list(inspect.signature(flash_dmattn_varlen_func).parameters)
    assert names[:11] == [
        "query",
        "key",
        "value",
        "attn_mask",
        "attn_bias",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "scale",
        "is_causal",
    ]
    names = list(inspect.signature(flash_dmattn.select_keys).parameters)
    assert names[:5] == ["attn_score", "keep_window_size", "is_causal", "num_sinks", "local_window"]
