"""How a problem can be solved: the library and what it is compared with, in one table.

A method is a generator that yields the name of each stage when that stage is done, for whoever drives it to
take the time, and returns its results: out, and where it has them lse, expiry, dq, dk, dv, dscore. A method
may have variants that do the same; the driver tries them and takes the fastest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cases import CUDNN, DENSE, FLEX, MASKED, OURS, Case, Problem
from flash_dmattn import flash_dmattn_func_auto, select_keys

Results = dict[str, Tensor]
Solve = Callable[[Problem], Generator[str, None, Results]]


class Method(NamedTuple):
    description: str
    windowed: bool  # computes the function with the keep window; otherwise plain causal attention
    variants: dict[str, Solve]
    why_not: Callable[[Case], str] = lambda case: ""


def _dynamic_mask(backend: str | None) -> Solve:
    attend = flash_dmattn_func_auto(backend)

    def solve(problem: Problem) -> Generator[str, None, Results]:
        expiry = select_keys(problem.score.detach(), problem.case.keep_window)
        yield "select"
        query, key, value, score = problem.inputs()
        out, lse = attend(query, key, value, attn_bias=score, expiry=expiry, is_causal=True, return_lse=True)
        yield "forward"
        results = {"expiry": expiry, "out": out.detach(), "lse": lse.detach()}
        if problem.case.backward:
            gradients = torch.autograd.grad(out, problem.inputs(), problem.dout)
            yield "backward"
            results |= zip(("dq", "dk", "dv", "dscore"), gradients)
        return results

    return solve


def _dense(repeat_heads: bool, backend: SDPBackend | None = None) -> Solve:
    def solve(problem: Problem) -> Generator[str, None, Results]:
        inputs = problem.query, problem.key, problem.value
        query, key, value = (x.transpose(1, 2) for x in inputs)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            if repeat_heads:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=not repeat_heads)
            yield "forward"
            return (yield from _backward(problem, out.transpose(1, 2), inputs))

    return solve


def dense_mask(score: Tensor, keep_window: int) -> Tensor:
    """[B, Hkv, N, N]: the score of a key where the query sees it, -inf elsewhere. Made as it is without an
    interval per key: a causal N x N matrix of scores, the top w of each row, scattered into the mask."""
    seqlen = score.shape[-1]
    future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=score.device).triu(1)
    rows = score[..., None, :].masked_fill(future, -torch.inf)
    top = rows.topk(min(keep_window, seqlen), dim=-1)
    return torch.full_like(rows, -torch.inf).scatter_(-1, top.indices, top.values)


def _masked(problem: Problem) -> Generator[str, None, Results]:
    """The mask is a constant: the score gets no gradient. Key/value heads become batch entries, so that the
    query heads of a group share one mask."""
    case, group = problem.case, problem.case.heads // problem.case.heads_kv
    mask = dense_mask(problem.score.detach(), case.keep_window).to(case.dtype).flatten(0, 1).unsqueeze(1)
    yield "mask"
    inputs = problem.query, problem.key, problem.value
    query, key, value = (x.transpose(1, 2).unflatten(1, (case.heads_kv, -1)).flatten(0, 1) for x in inputs)
    key, value = (x.expand(-1, group, -1, -1) for x in (key, value))  # [B * Hkv, group, N, D]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = out.unflatten(0, (case.batch, case.heads_kv)).flatten(1, 2).transpose(1, 2)
    yield "forward"
    return (yield from _backward(problem, out, inputs))


def _backward(problem: Problem, out: Tensor, inputs: tuple[Tensor, ...]) -> Generator[str, None, Results]:
    results = {"out": out.detach()}
    if problem.case.backward:
        gradients = torch.autograd.grad(out, inputs, problem.dout)
        yield "backward"
        results |= zip(("dq", "dk", "dv"), gradients)
    return results


def _cuda_only(case: Case) -> str:
    return "" if case.device == "cuda" else "runs on CUDA"


METHODS = {
    OURS: Method("selection, forward, backward of this library", True, {"": _dynamic_mask(None)}),
    DENSE: Method(
        "scaled_dot_product_attention(is_causal=True), all keys",
        False,
        {"enable_gqa": _dense(False), "repeat_interleave": _dense(True)},
    ),
    MASKED: Method("scaled_dot_product_attention with the dense top-w mask", True, {"": _masked}),
    FLEX: Method("FlexAttention with the interval mask", True, {"": _dynamic_mask("flex")}, _cuda_only),
    CUDNN: Method(
        "cuDNN through scaled_dot_product_attention(is_causal=True), all keys",
        False,
        {"": _dense(False, SDPBackend.CUDNN_ATTENTION)},
        _cuda_only,
    ),
}


def run(solve: Solve, problem: Problem, mark: Callable[[str], None] = lambda stage: None) -> Results:
    """Drives a method; mark is called after every stage."""
    stages = solve(problem)
    while True:
        try:
            stage = next(stages)
        except StopIteration as end:
            return end.value
        mark(stage)
