"""`python -m flash_dmattn check`: does this installation compute what reference.py defines?

Every backend on every device of the machine, in seconds: the selection must equal the heap's, integer by
integer; out, lse and gradients must agree with the reference in float64 on the same rounded inputs. It finds
a broken installation; correctness in depth is the business of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, reference
from ._arguments import SelectProblem, packed_problem, padded_problem

__all__ = ["check"]

# Largest |x - ref| over the largest |ref| of a tensor.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
HEADS, HEADS_KV, HEAD_DIM = 6, 2, 40


class Case(NamedTuple):
    name: str
    seqlen_q: int
    seqlen_k: int
    keep_window_size: int | None
    is_causal: bool
    num_padded: int = 0  # keys hidden by a mask, at the start: with causality the first rows see nothing
    cu_seqlens: tuple[int, ...] | None = None
    is_dense: bool = False  # mask and bias have a query axis


CASES = (
    Case("window", 200, 200, 37, True),
    Case("window, fewer queries than keys", 70, 200, 64, True),
    Case("window, padded", 133, 133, 16, True, num_padded=20),
    Case("window, not causal", 90, 60, 21, False),
    Case("window, packed", 180, 180, 25, True, cu_seqlens=(0, 100, 100, 101, 180)),
    Case("no window", 150, 170, None, True),
    Case("dense mask and bias", 130, 170, None, True, is_dense=True),
)


def check() -> bool:
    """Prints what it compares; True if everything agrees."""
    available = _backends.available()
    print(f"backends: {', '.join(available)}")
    good = "cpu" in available
    if not good:
        print(f"no native library: {_backends.load_error}")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    pairs = [
        (backend, device)
        for backend in _backends.BACKENDS
        for device in devices
        if backend.name in available and backend.name in (device.split(":")[0], "flex", "reference")
    ]
    print("\nselection: expiry of every key, against a heap")
    for backend, device in pairs:
        good &= _check_selection(backend, device)
    print("\nattention: worst |x - ref| / max |ref|, against the reference in float64")
    print(
        f"{'backend':10}{'device':8}{'dtype':10}{'cases':>6}"
        + "".join(f"{name:>9}" for name in NAMES)
        + f"{'limit':>9}"
    )
    for backend, device in pairs:
        # FlexAttention compiles every kind of call anew.
        for dtype in (torch.float32,) if backend.name == "flex" else LIMITS:
            good &= _check_attention(backend, device, dtype)
    print("\neverything agrees" if good else "\nFAILED")
    return good


def _scores() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 3, 300, generator=generator, dtype=torch.float64)
    yield "normal", normal
    yield "all equal", torch.zeros_like(normal)
    yield "ties, -0 and +0", normal.round() * torch.where(normal > 0, 1.0, -0.0)
    yield (
        "-inf, NaN and +inf",
        torch.where(
            normal < -1,
            -math.inf,
            torch.where(normal > 1.5, math.inf, torch.where(normal.abs() < 0.2, math.nan, normal)),
        ),
    )


def _check_selection(backend: _backends.Backend, device: str) -> bool:
    compared, wrong = 0, []
    for dtype in LIMITS:
        for name, score in _scores():
            score = score.to(dtype)
            for keep_window_size in (1, 7, 64, 300, 1000):
                for is_causal, num_sinks, local_window in ((True, 0, 0), (True, 3, 5), (False, 0, 0)):
                    options = (keep_window_size, is_causal, num_sinks, local_window)
                    expiry = backend.select(SelectProblem("check", score.to(device), *options, None))
                    if not torch.equal(expiry.cpu(), reference.select_keys(score, *options)):
                        wrong.append(f"{name} {dtype} {options}")
                    compared += score.shape[0] * score.shape[1]
    verdict = f"{len(wrong)} wrong, first: {wrong[0]}" if wrong else "all equal"
    print(f"{backend.name:10}{device:8}{compared} heads: {verdict}")
    return not wrong


class Inputs(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value, bias
    mask: Tensor | None
    cu_seqlens: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def _inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Rounded to dtype (the bias to float32 at least), held in float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, round_to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(round_to).double()

    accumulate = _accumulation_dtype(dtype)
    batch = () if case.cu_seqlens else (2,)
    query = normal(*batch, case.seqlen_q, HEADS, HEAD_DIM)
    key, value = (normal(*batch, case.seqlen_k, HEADS_KV, HEAD_DIM) for _ in range(2))
    bias = normal(*batch, case.seqlen_k, HEADS_KV, round_to=accumulate)
    grad_out = normal(*query.shape)
    grad_lse = normal(*batch, HEADS, case.seqlen_q, round_to=accumulate)
    mask = torch.arange(case.seqlen_k).expand(2, -1) >= case.num_padded if case.num_padded else None
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None
    if case.is_dense:
        mask = torch.rand(2, HEADS_KV, case.seqlen_q, case.seqlen_k, generator=generator) < 0.3
        bias = normal(1, HEADS, case.seqlen_q, case.seqlen_k, round_to=accumulate)
    elif cu_seqlens is None:
        bias = bias.mT
    return Inputs((query, key, value, bias), mask, cu_seqlens, grad_out, grad_lse)


def _results(
    case: Case, inputs: Inputs, backend: _backends.Backend, device: str, dtype: torch.dtype
) -> list[Tensor] | None:
    """out, lse and, where the backend has a backward, the gradients; None if it does not take the case."""
    accumulate = _accumulation_dtype(dtype)
    query, key, value, bias = (
        tensor.to(device, dtype if index < 3 else accumulate).requires_grad_()
        for index, tensor in enumerate(inputs.tensors)
    )
    options: dict[str, Any] = {
        "attn_bias": bias,
        "is_causal": case.is_causal,
        "keep_window_size": case.keep_window_size,
        "return_lse": True,
    }
    if inputs.mask is not None:
        options["attn_mask"] = inputs.mask.to(device)
    make_problem = padded_problem
    if inputs.cu_seqlens is not None:
        make_problem = packed_problem
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = inputs.cu_seqlens.to(device)

    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            problem = make_problem("check", query, key, value, **options)
            if backend.why_not(problem):
                continue
            out, lse = _backends.attend(problem, backend.name)
            grads = ()
            if with_grad:
                grad_outputs = (inputs.grad_out.to(out), inputs.grad_lse.to(lse))
                grads = torch.autograd.grad((out, lse), (query, key, value, bias), grad_outputs)
            return [tensor.detach().double().cpu() for tensor in (out, lse, *grads)]
    return None


def _check_attention(backend: _backends.Backend, device: str, dtype: torch.dtype) -> bool:
    worst, num_cases = [-1.0] * len(NAMES), 0
    for case in CASES:
        inputs = _inputs(case, dtype)
        try:
            results = _results(case, inputs, backend, device, dtype)
        except Exception as error:  # whatever a broken installation may raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{backend.name:10}{device:8}{case.name}: WRONG, {what}")
            return False
        if results is None:
            continue
        num_cases += 1
        expected = _results(case, inputs, _backends.BACKENDS[-1], "cpu", torch.float64)
        for index, (result, reference_result) in enumerate(zip(results, expected)):
            worst[index] = max(worst[index], _error(result, reference_result))
    if num_cases == 0:
        return True
    errors = "".join(f"{'-' if error < 0 else format(error, '.1e'):>9}" for error in worst)
    good = max(worst) <= LIMITS[dtype] and worst[NAMES.index("lse")] <= LIMITS[_accumulation_dtype(dtype)]
    name = str(dtype).removeprefix("torch.")
    row = f"{backend.name:10}{device:8}{name:10}{num_cases:6}{errors}{LIMITS[dtype]:9.0e}"
    print(row if good else f"{row}  WRONG")
    return good


def _error(result: Tensor, expected: Tensor) -> float:
    """inf where the non-finite values (lse of rows that see nothing) differ."""
    finite = expected.isfinite()
    if not torch.equal(result[~finite], expected[~finite]) or not result[finite].isfinite().all():
        return math.inf
    return ((result - expected)[finite].abs().max() / expected[finite].abs().max()).item()


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
