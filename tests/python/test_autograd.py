"""Gradients as PyTorch sees them: gradcheck, autocast, activation checkpointing, dtypes of what comes
back."""

import flash_dmattn
import pytest
import torch
from flash_dmattn import flash_dmattn_func, flash_dmattn_varlen_func
from torch.utils.checkpoint import checkpoint

from cases import Case, make
from counters import count
from kernels import bit_for_bit, forced

SMALL = dict(batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, heads_kv=2, head_dim=3, keep_window=3, dtype="f64")


def leaves_of(problem):
    return [
        tensor.detach().clone().requires_grad_()
        for tensor in (problem.query, problem.key, problem.value, problem.bias)
    ]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep_window", [3, None])
def test_gradcheck(kernel, causal, keep_window, backend):
    """Numerical against analytical, for out and lse, in float64; the analytical one twice, with equal
    bits."""
    problem = make(Case(**(SMALL | dict(keep_window=keep_window, causal=causal, bias="separate")))).to(
        kernel.device
    )
    options = dict(is_causal=causal, return_lse=True)
    if keep_window:
        options |= dict(keep_window_size=keep_window, attn_score=problem.score)

    def function(query, key, value, bias):
        return flash_dmattn_func(query, key, value, attn_bias=bias, **options)

    with forced(backend):
        assert torch.autograd.gradcheck(function, leaves_of(problem), nondet_tol=0.0)
    count("property")


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_packed(kernel, causal):
    lengths = ((2, 4), (0, 0), (3, 3), (0, 2), (1, 5))
    problem = make(
        Case(
            lengths=lengths,
            heads_q=4,
            heads_kv=2,
            head_dim=3,
            dtype="f64",
            keep_window=2,
            causal=causal,
            bias="separate",
        )
    ).to(kernel.device)

    def function(query, key, value, bias):
        return flash_dmattn_varlen_func(
            query,
            key,
            value,
            attn_bias=bias,
            attn_score=problem.score,
            keep_window_size=2,
            is_causal=causal,
            cu_seqlens_q=problem.cu_seqlens_q,
            cu_seqlens_k=problem.cu_seqlens_k,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(function, leaves_of(problem), nondet_tol=0.0)
    count("property")


FORMS = ["[B, H, Sq, Sk]", "[1, Hkv, Sq, Sk]", "[B, 1, Sq, Sk]", "[B, H, 1, Sk]", "[1, H, 1, Sk]"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_dense_bias(kernel, form, masked):
    problem = make(Case(**SMALL)).to(kernel.device)
    mask = torch.rand(2, 2, 5, 7, device=kernel.device) < 0.7 if masked else None
    sizes = {"B": 2, "H": 4, "Hkv": 2, "Sq": 5, "Sk": 7, "1": 1}
    bias = torch.randn(
        [sizes[axis] for axis in form[1:-1].split(", ")], dtype=torch.float64, device=kernel.device
    )
    leaves = leaves_of(problem)[:3] + [bias.requires_grad_()]

    def function(query, key, value, bias):
        return flash_dmattn_func(
            query, key, value, attn_bias=bias, attn_mask=mask, is_causal=True, return_lse=True
        )

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)
    count("property")


def test_the_reference_is_differentiable_twice(kernel):
    problem = make(Case(**SMALL)).to(kernel.device)

    def function(query, key, value, bias):
        return flash_dmattn_func(query, key, value, attn_bias=bias, keep_window_size=3, is_causal=True)

    with forced("reference"):
        assert torch.autograd.gradgradcheck(function, leaves_of(problem))
    count("property")


@pytest.mark.parametrize(
    "bias_shape", [(2, 2, 7), (1, 2, 7), (2, 1, 7), (1, 1, 7), (2, 2, 1, 7), (1, 1, 1, 7)]
)
@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_the_gradient_of_a_bias_has_its_shape_and_dtype(kernel, dtype, bias_dtype, bias_shape):
    problem = make(Case(**(SMALL | dict(dtype=dtype)))).to(kernel.device)
    bias = torch.randn(bias_shape, device=kernel.device).to(bias_dtype).requires_grad_()
    arguments = (problem.query, problem.key, problem.value)
    flash_dmattn_func(*arguments, attn_bias=bias, is_causal=True).backward(problem.dout)
    assert (bias.grad.shape, bias.grad.dtype) == (bias.shape, bias.dtype)
    wide = bias.detach().to(torch.float64 if dtype == "f64" else torch.float32)
    whole = wide.reshape(*bias_shape[:2], 7).expand(2, 2, 7).contiguous().requires_grad_()
    flash_dmattn_func(*arguments, attn_bias=whole, is_causal=True).backward(problem.dout)
    summed = whole.grad.sum_to_size(*bias_shape[:2], 7).reshape(bias_shape)
    torch.testing.assert_close(bias.grad.double(), summed.to(bias_dtype).double(), rtol=2.0**-7, atol=1e-6)
    count("property")


def test_selection_has_no_gradient(kernel):
    """Where bias and score are one tensor it gets dbias and nothing else; a score alone gets nothing."""
    problem = make(Case(**SMALL)).to(kernel.device)
    query, key, value, score = leaves_of(problem)
    flash_dmattn_func(
        query, key, value, attn_score=score, keep_window_size=3, is_causal=True
    ).sum().backward()
    assert score.grad is None and query.grad is not None
    grads = []
    for options in (dict(keep_window_size=3), dict(expiry=flash_dmattn.select_keys(problem.score, 3))):
        leaves = leaves_of(problem)
        flash_dmattn_func(*leaves[:3], attn_bias=leaves[3], is_causal=True, **options).sum().backward()
        grads.append(leaves[3].grad)
    assert bit_for_bit(*grads)
    assert not flash_dmattn.select_keys(score, 3).requires_grad
    count("bitwise")


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [dict(), dict(keep_window_size=16)])
def test_autocast(kernel, amp_dtype, window):
    """Query, key and value follow autocast; bias and score keep their dtype, so ties do not appear."""
    problem = make(Case(seqlen_q=60, seqlen_k=60, head_dim=16)).to(kernel.device)
    bias = 1 + 1e-4 * problem.bias  # all equal in half precision
    results = []
    for enabled in (True, False):
        leaves = [
            tensor.detach().clone().requires_grad_()
            for tensor in (problem.query, problem.key, problem.value, bias)
        ]
        passed = leaves if enabled else [leaf.to(amp_dtype) for leaf in leaves[:3]] + leaves[3:]
        with torch.autocast(kernel.device, dtype=amp_dtype, enabled=enabled):
            out = flash_dmattn_func(*passed[:3], attn_bias=passed[3], is_causal=True, **window)
        assert out.dtype == amp_dtype
        out.backward(problem.dout.to(amp_dtype))
        assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 4
        results.append([out, *(leaf.grad for leaf in leaves)])
    for first, second in zip(*results):
        assert bit_for_bit(first, second)
        count("bitwise")


def test_autocast_leaves_float64_alone(kernel):
    problem = make(Case(**SMALL)).to(kernel.device)
    with torch.autocast(kernel.device, dtype=torch.bfloat16):
        assert (
            flash_dmattn_func(problem.query, problem.key, problem.value, is_causal=True).dtype
            == torch.float64
        )


@pytest.mark.parametrize("dense_bias", [None, "1 Hkv Sq Sk"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(kernel, use_reentrant, dense_bias):
    case = Case(batch=2, seqlen_q=60, seqlen_k=60, head_dim=16, dense_bias=dense_bias)
    problem = make(case).to(kernel.device)
    options = dict(keep_window_size=16) if dense_bias is None else {}

    def function(query, key, value, bias):
        return flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True, **options)

    grads = []
    for call in (lambda *leaves: checkpoint(function, *leaves, use_reentrant=use_reentrant), function):
        leaves = leaves_of(problem)
        call(*leaves).backward(problem.dout)
        grads.append([leaf.grad for leaf in leaves])
    for first, second in zip(*grads):
        assert bit_for_bit(first, second)
        count("bitwise")


def test_only_lse_is_used(kernel):
    """The gradient of lse alone: out's is absent, not zeros that someone made."""
    problem = make(Case(**SMALL)).to(kernel.device)
    grads = []
    for backend in (None, "reference"):
        leaves = leaves_of(problem)
        with forced(backend):
            _, lse = flash_dmattn_func(*leaves[:3], attn_bias=leaves[3], is_causal=True, return_lse=True)
        lse.sum().backward()
        grads.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    for first, second in zip(*grads):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
        count("property")


def test_inference_mode_and_no_grad(kernel):
    problem = make(Case(**SMALL)).to(kernel.device)
    leaves = leaves_of(problem)
    wanted = flash_dmattn_func(*leaves[:3], attn_bias=leaves[3], is_causal=True, keep_window_size=3)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = flash_dmattn_func(*leaves[:3], attn_bias=leaves[3], is_causal=True, keep_window_size=3)
        assert not out.requires_grad and bit_for_bit(out, wanted)
        count("bitwise")
