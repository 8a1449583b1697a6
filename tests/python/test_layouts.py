"""P6: any strides and offsets give the bits that contiguous tensors give; inputs stay as they are."""

import flash_dmattn
import pytest
import torch

from cases import Case, make
from counters import count
from kernels import bit_for_bit
from narrowing import fit

BASE = dict(batch=2, seqlen_q=50, seqlen_k=90, heads_q=6, heads_kv=2, head_dim=40, keep_window=16, dlse=True)
INPUTS = ("query", "key", "value", "bias", "mask", "score", "dout", "dlse")
KEY_ONLY = tuple(name for name in INPUTS if name != "mask")  # what a call without a mask has


def swapped(first, second):
    """Two axes exchanged in memory: [B, S, H, D] stored as [B, H, S, D], and so on."""

    def form(tensor):
        if tensor.dim() <= max(first, second):
            return tensor
        return tensor.transpose(first, second).contiguous().transpose(first, second)

    return form


def offset(elements):
    def form(tensor):
        junk = tensor.new_full((elements,), torch.nan)
        return torch.cat([junk, tensor.flatten(), junk])[elements : elements + tensor.numel()].view(
            tensor.shape
        )

    return form


def fused(tensor):
    """A slice of a larger projection, as q, k, v of one matrix product are."""
    return torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], -1)[
        ..., tensor.shape[-1] : 2 * tensor.shape[-1]
    ]


def every_other(tensor):
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]


def negated_view(tensor):
    """A view whose numbers are stored with the opposite sign, which PyTorch resolves when they are read."""
    if tensor.dtype not in (torch.float64, torch.float32):
        return tensor
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


FORMS = {
    "BHSD": swapped(1, 2),
    "SBHD": swapped(0, 1),
    "BSDH": swapped(2, 3),
    "DSHB": swapped(0, 3),
    **{f"offset {n}": offset(n) for n in (1, 3)},
    "fused": fused,
    "every other": every_other,
    "negated view": negated_view,
}


def assert_same(results, wanted, what):
    for name, tensor in wanted.items():
        assert bit_for_bit(results[name], tensor), f"{what}: {name}"
        count("bitwise")


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("form", FORMS)
def test_layout(kernel, form, dtype):
    problem = make(Case(**BASE, dtype=dtype)).to(kernel.device)
    wanted = kernel.run(problem)
    expiry = kernel.select(problem)
    changed = problem.replace(**{name: FORMS[form](getattr(problem, name)) for name in KEY_ONLY})
    before = {name: getattr(changed, name).clone() for name in KEY_ONLY}
    assert torch.equal(kernel.select(changed), expiry)
    assert_same(kernel.run(changed), wanted, form)
    # What forward gave backward, and expiry, may have been moved as well.
    selection = (
        expiry
        if form in ("negated view",) or form.startswith(("offset", "fused", "every"))
        else FORMS[form](expiry)
    )
    moved = {name: FORMS[form](wanted[name]) for name in ("out", "lse")}
    assert_same(
        kernel.backward(changed, selection, moved["out"], moved["lse"]),
        {name: wanted[name] for name in ("dq", "dk", "dv", "dbias")},
        form,
    )
    for name in KEY_ONLY:
        assert bit_for_bit(getattr(changed, name), before[name]), f"{name} was changed"


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
def test_every_offset_from_0_to_15(kernel, dtype):
    problem = make(Case(**BASE, dtype=dtype)).to(kernel.device)
    wanted = kernel.run(problem)
    for elements in range(16):
        moved = problem.replace(**{name: offset(elements)(getattr(problem, name)) for name in KEY_ONLY})
        assert_same(kernel.run(moved), wanted, f"offset {elements}")


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
def test_size_one_axes_have_no_stride(kernel, dtype):
    case = Case(
        batch=1,
        seqlen_q=1,
        seqlen_k=70,
        heads_q=1,
        heads_kv=1,
        head_dim=24,
        keep_window=16,
        dtype=dtype,
        dlse=True,
    )
    problem = make(case).to(kernel.device)

    def absurd(tensor):
        strides = [stride if size > 1 else 2**61 + 7 for size, stride in zip(tensor.shape, tensor.stride())]
        return tensor.as_strided(tensor.shape, strides)

    changed = problem.map(absurd)
    assert changed.query.stride(0) == 2**61 + 7
    assert_same(kernel.run(changed), kernel.run(problem), "absurd strides")
    assert torch.equal(kernel.select(changed), kernel.select(problem))


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_inputs(kernel, axis, dtype):
    """Stride 0 along each axis in turn."""
    problem = make(Case(**BASE, dtype=dtype)).to(kernel.device)
    axes = {"query": axis, "key": axis, "value": axis, "dout": axis}
    if axis < 3:
        axes |= {"bias": axis, "score": axis, "dlse": axis}
    expanded = {
        name: getattr(problem, name).narrow(at, 0, 1).expand_as(getattr(problem, name))
        for name, at in axes.items()
    }
    repeated = problem.replace(**{name: tensor.contiguous() for name, tensor in expanded.items()})
    assert_same(kernel.run(problem.replace(**expanded)), kernel.run(repeated), f"expanded along {axis}")


def test_overlapping_rows(kernel):
    """Windows into one buffer: rows share memory, which is fine for what is only read."""
    problem = make(fit(Case(**BASE), kernel)).to(kernel.device)
    buffer = torch.randn(5000, device=kernel.device).to(problem.key.dtype)
    key = buffer.as_strided(problem.key.shape, (1000, 7, 13, 1))
    wanted = kernel.run(problem.replace(key=key.contiguous(), value=key.contiguous()))
    assert_same(kernel.run(problem.replace(key=key, value=key)), wanted, "overlapping")


def test_the_gradient_of_a_sum_is_expanded(kernel):
    problem = make(fit(Case(**BASE), kernel)).to(kernel.device)
    grads = []
    for reduce in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        leaves = [
            tensor.clone().requires_grad_()
            for tensor in (problem.query, problem.key, problem.value, problem.bias)
        ]
        out = flash_dmattn.flash_dmattn_func(
            *leaves[:3], attn_bias=leaves[3], is_causal=True, keep_window_size=16
        )
        reduce(out).backward()
        grads.append({str(index): leaf.grad for index, leaf in enumerate(leaves)})
    assert_same(*grads, "sum().backward()")


@pytest.mark.parametrize("form", ["BHSD", "fused", "every other", "offset 3"])
def test_packed_layouts(kernel, form):
    form = {"BHSD": swapped(0, 1)}.get(form) or FORMS[form]
    case = Case(
        lengths=((20, 30), (0, 4), (33, 33)), heads_q=4, heads_kv=2, head_dim=24, keep_window=8, dlse=True
    )
    problem = make(fit(case, kernel)).to(kernel.device)
    changed = problem.replace(**{name: form(getattr(problem, name)) for name in KEY_ONLY})
    assert_same(kernel.run(changed), kernel.run(problem), "packed")
