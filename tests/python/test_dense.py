"""Masks and biases with a query axis: accuracy over every form, and what must not reach a result.

What they share with the key-only forms is tested beside those: poison, fuzz, refusals, gradcheck,
torch.compile. How the public functions bring their arguments into these forms: test_backends.py.
"""

import itertools

import flash_dmattn
import pytest
import torch

import ranking
from cases import DTYPES, Case, make
from counters import count
from judge import check, require
from kernels import bit_for_bit
from narrowing import fit
from probe import Probe, count_exactly, make_probe, tier_a
from properties import all_properties
from test_bitwise import assert_same, cut
from test_layouts import FORMS as LAYOUTS

BASE = dict(
    batch=2, seqlen_q=70, seqlen_k=130, heads_q=4, heads_kv=2, head_dim=24, keep_window=None, bias="none"
)
FORMS = [" ".join(axes) + " Sk" for axes in itertools.product(("B", "1"), ("H", "Hkv", "1"), ("Sq", "1"))]
ALL = ("f64", "f32", "bf16", "f16")


def case_of(**changes):
    return Case(**(BASE | changes))


def with_cases(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


CASES = {
    "bias forms": [
        case_of(dense_bias=form, dtype=dtype, causal=causal, dlse=True)
        for index, form in enumerate(FORMS)
        for dtype, causal in ((ALL[index % 4], True), (ALL[(index + 2) % 4], False))
    ],
    "mask forms": [case_of(mask=form, dtype=ALL[index % 4]) for index, form in enumerate(FORMS)],
    "types": [
        case_of(dense_bias=form, dense_dtype=dense, dtype=dtype, mask="1 1 Sq Sk", visible=0.6, dlse=True)
        for dtype in ALL
        for dense in ALL
        for form in ("B H Sq Sk", "1 1 1 Sk")
    ],
    "both": [
        case_of(mask=mask, dense_bias=bias, dtype=dtype, causal=causal)
        for mask, bias in (("B H Sq Sk", "1 1 Sq Sk"), ("B 1 1 Sk", "B H Sq Sk"), ("1 Hkv Sq Sk", "1 H 1 Sk"))
        for dtype in ("f32", "bf16")
        for causal in (True, False)
    ],
    "key-only bias": [
        case_of(bias="separate", mask=mask, dtype=dtype)
        for mask in ("B H Sq Sk", "1 1 Sq Sk")
        for dtype in ("f64", "bf16")
    ],
    "windows": [
        case_of(keep_window=40, bias=bias, score=score, causal=causal, dtype=dtype, **dense)
        for bias, score, dense in (
            ("score", "normal", dict(mask="B H Sq Sk")),
            ("none", "minus_inf", dict(dense_bias="B Hkv Sq Sk")),
            ("none", "falling", dict(mask="B 1 Sq Sk", dense_bias="1 1 Sq Sk")),
        )
        for causal in (True, False)
        for dtype in ("f32", "f16")
    ],
    "densities": [
        case_of(mask="B Hkv Sq Sk", dense_bias="B H Sq Sk", visible=visible, dtype=dtype, seqlen_k=400)
        for visible in (0.0, 0.002, 0.02, 1.0)
        for dtype in ("f32", "bf16")
    ],
    "groups": [
        case_of(
            batch=1, heads_q=group * heads_kv, heads_kv=heads_kv, dense_bias=bias, mask="B H Sq Sk",
            dtype=dtype,
        )
        for group, heads_kv in ((1, 1), (1, 5), (3, 2), (5, 1), (16, 1))
        for bias in ("B H Sq Sk", "1 Hkv Sq Sk", "1 1 Sq Sk", "1 H 1 Sk")
        for dtype in ("f32", "bf16")
    ],
    "head dims": [
        case_of(head_dim=dim, dense_bias="1 1 Sq Sk", mask="1 H Sq Sk", dtype=dtype, batch=1)
        for dim in (1, 7, 16, 33, 64, 96, 128, 192, 256, 260)
        for dtype in ("f32", "bf16")
    ],
    "lengths": [
        case_of(seqlen_q=q, seqlen_k=k, dense_bias="B H Sq Sk", mask="1 1 Sq Sk", visible=0.5, causal=causal)
        for q, k in ((1, 1), (1, 300), (2, 65), (17, 17), (64, 64), (65, 129), (128, 128), (129, 257))
        for causal in (True, False)
    ],
    "sizes": [
        case_of(batch=batch, seqlen_q=q, seqlen_k=k, dense_bias=bias, mask="1 1 Sq Sk", causal=False)
        for batch, q, k in ((0, 5, 9), (3, 0, 9), (3, 5, 0), (1, 0, 0))
        for bias in ("B H Sq Sk", "1 1 1 Sk")
    ],
    "fewer keys": [case_of(seqlen_k=20, causal=False, mask="B H Sq Sk", dense_bias="1 H Sq Sk")],
    "scales": [
        case_of(dense_bias="B H Sq Sk", mask="B 1 Sq Sk", scale=scale, logit=logit, dtype=dtype, dlse=True)
        for scale, logit in ((0.0, 1.0), (-0.3, 2.0), (None, 300.0))
        for dtype in ("f64", "f32", "bf16")
    ],
    "long": [
        case_of(
            batch=1, heads_q=2, heads_kv=1, seqlen_q=700, seqlen_k=1500, dtype=dtype, mask=mask,
            dense_bias=bias,
        )
        for dtype in ("f32", "bf16")
        for mask, bias in (("1 1 Sq Sk", "1 H Sq Sk"), ("1 1 1 Sk", "1 1 1 Sk"))
    ]
    + [
        case_of(
            batch=1, heads_q=2, heads_kv=1, seqlen_q=1300, seqlen_k=1300, keep_window=200, mask="1 1 Sq Sk",
            bias="score", dtype="bf16", dlse=True,
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{name}-{case.id}") for name, table in CASES.items() for case in table]
)
def test_within_bounds(kernel, case):
    if case.dtype not in kernel.dtypes:
        pytest.skip(f"{kernel.name} takes no {case.dtype}")
    check(kernel, case)


SOME = [
    case_of(dense_bias="B H Sq Sk", mask="B H Sq Sk", dlse=True),
    case_of(dense_bias="B Hkv Sq Sk", dtype="bf16", dlse=True),
    case_of(dense_bias="1 1 Sq Sk", mask="1 1 Sq Sk", dtype="f64", causal=False),
    case_of(dense_bias="B 1 1 Sk", mask="B 1 1 Sk", dtype="f16", dlse=True),
    case_of(bias="score", keep_window=32, mask="B Hkv Sq Sk", dlse=True),
    case_of(
        batch=1, seqlen_q=1100, seqlen_k=1300, heads_q=2, heads_kv=1, dense_bias="1 1 Sq Sk", mask="1 H Sq Sk"
    ),
]  # fmt: skip


@with_cases(SOME)
def test_identities(kernel, case):
    problem = make(case).to(kernel.device)
    require(all_properties(kernel, problem, kernel.run(problem)), repr(case))


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dense", ["mask", "mask of heads", "bias"])
def test_structure_is_exact(kernel, dense, causal, dtype, run):
    """Tier A: the probe's selection as a mask, or as a bias of -inf beside the probe's own tiny one."""
    probe = Probe(dtype, 32, 150, 230, heads_q=6, heads_kv=2, head_dim=32, run=run, causal=causal)
    problem = make_probe(probe)
    counted = count_exactly(problem)
    heads = problem.bias.flatten(0, 1).double().numpy()
    sees = torch.from_numpy(ranking.visible(heads, probe.keep_window, causal))[:, -probe.seqlen_q :]
    sees = sees.unflatten(0, problem.bias.shape[:2])
    changes = dict(mask=sees)
    if dense == "mask of heads":
        changes = dict(mask=sees.repeat_interleave(3, 1))
    elif dense == "bias":
        changes = dict(bias=problem.bias[:, :, None].masked_fill(~sees, -torch.inf))
    problem = problem.replace(score=None, keep_window=None, **changes)
    results = kernel.run(problem.to(kernel.device))
    if dense == "bias":
        results["dbias"] = results["dbias"].sum(2)
    failures = tier_a(results, counted, probe, kernel.keeps_float32)
    require(failures, f"{probe}, {dense}")


@with_cases(SOME)
def test_repeated_runs_and_numbers_of_threads(kernel, case):
    problem = make(case).to(kernel.device)
    first = kernel.run(problem)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(kernel.run(problem), first, f"{threads} threads")


@with_cases(SOME)
def test_every_subset_of_gradients(kernel, case):
    problem = make(case).to(kernel.device)
    whole = kernel.run(problem)
    expiry = kernel.select(problem)
    for needs in itertools.product((True, False), repeat=4):
        grads = kernel.backward(problem, expiry, whole["out"], whole["lse"], needs)
        assert_same(grads, {name: whole[name] for name in grads}, f"gradients {needs}")


def of_entry(dense, b):
    return dense if dense is None or dense.shape[0] == 1 else dense[b : b + 1]


@with_cases([case for case in SOME if case.batch > 1])
def test_a_batch_entry_is_what_it_is_alone(kernel, case):
    problem = make(case).to(kernel.device)
    together = kernel.run(problem)
    for b in range(case.batch):
        entry = cut(problem.replace(mask=None, bias=None), batch=slice(b, b + 1))
        alone = kernel.run(entry.replace(mask=of_entry(problem.mask, b), bias=of_entry(problem.bias, b)))
        wanted = {name: tensor[b : b + 1] for name, tensor in together.items()}
        if problem.bias is not None and problem.bias.shape[0] == 1:  # its gradient is a sum over the batch
            del wanted["dbias"]
        assert_same(alone, wanted, f"entry {b} alone")


@with_cases([case for case in SOME if case.causal])
def test_later_keys_change_nothing_before_them(kernel, case):
    """Their keys and values, that is, with the mask and the bias that they are."""
    problem = make(case).to(kernel.device)
    before = kernel.run(problem)
    rows = slice(0, case.seqlen_q // 2)
    first = case.seqlen_k - case.seqlen_q + rows.stop
    changed = {name: getattr(problem, name).clone() for name in ("key", "value")}
    for tensor in changed.values():
        tensor[:, first:] *= -3
    after = kernel.run(problem.replace(**changed))
    for name in ("out", "dq"):
        assert bit_for_bit(after[name][:, rows], before[name][:, rows]), name
        count("bitwise")


def visible_pairs(problem, expiry):
    """bool [B, H, Sq, Sk]"""
    batch, seqlen_q, heads_q, _ = problem.query.shape
    seqlen_k, heads_kv = problem.key.shape[1:3]

    def whole(dense):
        if dense.shape[1] == heads_kv:
            dense = dense.repeat_interleave(heads_q // heads_kv, 1)
        return dense.expand(batch, heads_q, seqlen_q, seqlen_k)

    sees = torch.ones(batch, heads_q, seqlen_q, seqlen_k, dtype=torch.bool, device=problem.query.device)
    position = torch.arange(seqlen_q, device=sees.device)[:, None] + seqlen_k - seqlen_q
    if problem.causal:
        sees &= torch.arange(seqlen_k, device=sees.device) <= position
    if expiry is not None:
        sees &= (position if problem.causal else seqlen_k - 1) < whole(expiry[:, :, None])
    if problem.mask is not None:
        sees &= whole(problem.mask)
    if problem.bias is not None:
        sees &= whole((problem.bias if problem.has_dense_bias else problem.bias[:, :, None]) != -torch.inf)
    return sees


HIDING = [
    case_of(mask="B Hkv Sq Sk", visible=0.03, dtype=dtype, causal=causal, **extra)
    for dtype in ALL
    for causal in (True, False)
    for extra in (
        dict(dense_bias="B H Sq Sk"),
        dict(dense_bias="1 1 Sq Sk"),
        dict(bias="score", keep_window=50, score="minus_inf"),
    )
]


@with_cases(HIDING)
def test_what_nobody_sees(kernel, case):
    """P4 and P5: keys that no row sees may hold anything and get 0; rows that see nothing give 0 and -inf,
    and get 0; so does the bias of pairs that are not visible."""
    problem = make(case).to(kernel.device)
    problem = problem.replace(mask=problem.mask.clone())
    problem.mask[0, :, 3:40] = False  # rows without keys
    expiry = kernel.select(problem)
    problem = problem.replace(score=None, fixed_expiry=expiry)
    sees = visible_pairs(problem, expiry)
    before = kernel.run(problem)
    empty = ~sees.any(-1)
    unseen = ~sees.any(2).unflatten(1, (case.heads_kv, -1)).any(2)
    assert empty.any() and not empty.all() and unseen.any() and not unseen.all()
    assert torch.equal(before["lse"] == -torch.inf, empty)
    for name in ("out", "dq"):
        assert (before[name].transpose(1, 2)[empty] == 0).all(), name
    for name in ("dk", "dv"):
        assert (before[name].transpose(1, 2)[unseen] == 0).all(), name
    if problem.has_dense_bias:
        hidden = ~sees if problem.bias.shape[0] > 1 else ~sees.any(1, keepdim=True).any(0, keepdim=True)
        assert (before["dbias"][hidden] == 0).all()
    rows = unseen.transpose(1, 2)[..., None]
    for junk in (torch.nan, torch.inf, -torch.inf):
        key, value = problem.key.masked_fill(rows, junk), problem.value.masked_fill(rows, junk)
        assert_same(kernel.run(problem.replace(key=key, value=value)), before, f"unseen keys are {junk}")


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("which", ["key", "value"])
def test_never_finite_and_wrong(kernel, which, dtype):
    """A NaN in a key that some rows see: those are NaN, others near what they were or not finite; the
    gradient of the bias is exactly 0 where a pair is not visible even so."""
    problem = make(case_of(mask="B H Sq Sk", dense_bias="B H Sq Sk", dtype=dtype)).to(kernel.device)
    clean, sees = kernel.run(problem), visible_pairs(problem, None)
    poisoned = getattr(problem, which).clone()
    poisoned[0, 70, 1, 3] = torch.nan
    results = kernel.run(problem.replace(**{which: poisoned}))
    users = sees[0, 2:, :, 70].T  # [row, head]
    assert users.any() and not users.all()
    out, others = results["out"][0, :, 2:], clean["out"][0, :, 2:]
    of_users = out[users] if which == "key" else out[users][..., 3]
    assert of_users.isnan().all()
    close = (out[~users] - others[~users]).abs() <= 0.05 * others[~users].abs() + 0.05
    assert (close | ~out[~users].isfinite()).all()
    assert torch.equal(results["out"][1], clean["out"][1])
    assert (results["dbias"][~sees] == 0).all()
    count("property", out.numel())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernel, layout, dtype):
    case = case_of(mask="B H Sq Sk", dense_bias="B Hkv Sq Sk", dtype=dtype)
    problem = make(case).to(kernel.device)
    changed = problem.replace(mask=LAYOUTS[layout](problem.mask), bias=LAYOUTS[layout](problem.bias))
    assert_same(kernel.run(changed), kernel.run(problem), layout)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_inputs(kernel, axis):
    """Stride 0 along each axis in turn."""
    problem = make(fit(case_of(mask="B H Sq Sk", dense_bias="B H Sq Sk"), kernel)).to(kernel.device)
    expanded = {
        name: getattr(problem, name).narrow(axis, 0, 1).expand_as(getattr(problem, name))
        for name in ("mask", "bias")
    }
    repeated = problem.replace(**{name: tensor.contiguous() for name, tensor in expanded.items()})
    assert_same(kernel.run(problem.replace(**expanded)), kernel.run(repeated), f"expanded along {axis}")


def test_any_byte_but_0_is_true(kernel):
    problem = make(fit(case_of(mask="B H Sq Sk"), kernel)).to(kernel.device)
    as_bytes = torch.randint(1, 256, problem.mask.shape, dtype=torch.uint8, device=kernel.device)
    results = kernel.run(problem.replace(mask=as_bytes * problem.mask))
    assert_same(results, kernel.run(problem), "a mask of bytes")


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_quick_start_of_the_original(is_causal):
    """A dense bias, its top keys scattered into a mask of zeros, both passed on. Scattered in place:
    `scatter` without the underscore returns the mask, and leaves this one all zero."""
    batch, seqlen, heads, heads_kv, dim, window = 1, 256, 4, 2, 64, 32
    query = torch.randn(batch, seqlen, heads, dim)
    key, value = torch.randn(2, batch, seqlen, heads_kv, dim).unbind(0)
    bias = torch.randn(batch, heads, seqlen, seqlen)
    mask = torch.zeros_like(bias)
    indices = torch.topk(bias, window, dim=-1).indices
    mask.scatter_(-1, indices, 1.0)
    results = {}
    for backend in ("cpu", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, bias)]
        attend = flash_dmattn.flash_dmattn_func_auto(backend=backend)
        out = attend(
            *leaves[:3], attn_mask=mask, attn_bias=leaves[3], scale=1.0 / dim**0.5, is_causal=is_causal
        )
        results[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for ours, reference in zip(*results.values()):
        torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-4)
        count("property", ours.numel())
    assert torch.count_nonzero(results["cpu"][4]) > 0.4 * batch * heads * seqlen * window


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("bias_dtype", ALL)
@pytest.mark.parametrize("form", ["B H Sq Sk", "1 Hkv 1 Sk", "1 1 Sq Sk"])
def test_the_gradient_of_a_bias_has_its_type(form, bias_dtype, dtype):
    """And autocast changes query, key and value alone."""
    problem = make(case_of(dense_bias=form, dense_dtype=bias_dtype, dtype=dtype))
    bias = problem.bias.requires_grad_()
    arguments = (problem.query, problem.key, problem.value)
    out = flash_dmattn.flash_dmattn_func(*arguments, attn_bias=bias, is_causal=True)
    (grad,) = torch.autograd.grad(out, bias, problem.dout)
    assert out.dtype == DTYPES[dtype] and (grad.dtype, grad.shape) == (bias.dtype, bias.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = flash_dmattn.flash_dmattn_func(*arguments, attn_bias=bias, is_causal=True)
    if dtype == "f64":
        assert bit_for_bit(cast, out)
    else:
        halves = (tensor.bfloat16() for tensor in arguments)
        wanted = flash_dmattn.flash_dmattn_func(*halves, attn_bias=bias, is_causal=True)
        assert bit_for_bit(cast, wanted)
    count("property", 3)
