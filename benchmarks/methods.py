"""How a problem can be solved: the library and what it is compared with, in one table.

A method is a generator that yields the name of each stage when that stage is done, for whoever drives it to
take the time, and returns its results: out, and where it has them lse, expiry, dq, dk, dv, dscore. What it
needs beside the inputs (a dense mask) is made by its setup, timed apart. A method may have variants that do
the same; the driver tries them and takes the fastest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_dmattn import flash_dmattn_func_auto, select_keys
from problem import Problem
from suites import CUDNN, DENSE, FLASH, FLEX, MASKED, OURS, STAGES, Case

Results = dict[str, Tensor]
Stages = Generator[str, None, Results]
Solve = Callable[[Problem, Tensor | None], Stages]

MOST_SECONDS = 2.0  # a baseline that takes longer for one run is not timed
DENSE_FLOPS = 1e14  # a second, of masked dense attention on the GPUs that this is run on, at least
MOST_MASK_BYTES = 0.5  # of the device's memory, with what is needed to make the mask
MOST_REPEATED_BYTES = 16 * 2**30


class Method(NamedTuple):
    description: str
    bias: str  # what is added to the logits of the keys in the window: "score"; "rounded", the score in the
    # type of the query; "none": no window, plain causal attention
    variants: dict[str, Solve]
    setup: Callable[[Problem], Tensor] | None = None
    why_not: Callable[[Case], str] = lambda case: ""

    @property
    def windowed(self) -> bool:
        return self.bias != "none"


def _public(problem: Problem, _: None) -> Stages:
    """What a user calls: selection, plan and attention are one stage."""
    query, key, value, score = problem.inputs()
    window = problem.case.keep_window
    attend = flash_dmattn_func_auto()
    out, lse = attend(
        query, key, value, attn_bias=score, is_causal=True, keep_window_size=window, return_lse=True
    )
    yield "forward"
    results = {"out": out.detach(), "lse": lse.detach()}
    return (yield from _backward(problem, out, problem.inputs(), results))


def _operators(problem: Problem, _: None) -> Stages:
    """Its parts; forward and backward are those of a given plan, where there is one."""
    case, ops = problem.case, torch.ops.flash_dmattn
    query, key, value, score = (x.detach() for x in problem.inputs())
    scale, window = case.head_dim**-0.5, case.keep_window
    expiry, plan = ops.select(score, window, True, 0, 0, None, case.seqlen_q), None
    yield "select"
    if case.device == "cuda":
        plan = ops.plan(expiry, score, score, None, None, case.seqlen_q, window, True)
        yield "plan"
    given = (score, None, expiry, score, plan)  # bias, mask, expiry, score, plan
    out, lse = ops.forward(query, key, value, *given, None, None, window, scale, True)
    yield "forward"
    results = {"expiry": expiry, "out": out, "lse": lse}
    if case.backward:
        gradients = ops.backward(
            problem.dout, None, query, key, value, *given, out, lse, None, None, window, scale, True,
            True, True, True, True,
        )  # fmt: skip
        yield "backward"
        results |= zip(("dq", "dk", "dv", "dscore"), gradients)
    return results


def _flex(problem: Problem, _: None) -> Stages:
    """Its block mask is made within the forward, as one is needed for every input."""
    query, key, value, score = problem.inputs()
    expiry = select_keys(score.detach(), problem.case.keep_window)
    yield "select"
    attend = flash_dmattn_func_auto("flex")
    out, lse = attend(query, key, value, attn_bias=score, expiry=expiry, is_causal=True, return_lse=True)
    yield "forward"
    results = {"out": out.detach(), "lse": lse.detach()}
    return (yield from _backward(problem, out, problem.inputs(), results))


def _dense(repeat_heads: bool, backend: SDPBackend | None = None) -> Solve:
    def solve(problem: Problem, _: None) -> Stages:
        inputs = problem.inputs()[:3]
        query, key, value = (x.transpose(1, 2) for x in inputs)
        causal = problem.case.seqlen_q > 1  # SDPA aligns its causal mask with the first key
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            if repeat_heads:
                key, value = (x.repeat_interleave(problem.case.group, dim=1) for x in (key, value))
            out = scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=not repeat_heads
            )
            yield "forward"
            out = out.transpose(1, 2)
            return (yield from _backward(problem, out, inputs, {"out": out.detach()}))

    return solve


def dense_mask(problem: Problem) -> Tensor:
    """[B, Hkv, Sq, Sk] in the type of the query: the score of a key where the query sees it, -inf elsewhere.
    Made as it is without an interval per key: a causal matrix of scores, the top w of each row, scattered
    into the mask; a head at a time, to bound the memory."""
    case = problem.case
    shape = case.batch, case.heads_kv, case.seqlen_q, case.seqlen_k
    mask = torch.full(shape, -torch.inf, dtype=case.dtype, device=case.device)
    future = torch.ones(shape[2:], dtype=torch.bool, device=case.device)
    future = future.triu(case.seqlen_k - case.seqlen_q + 1)
    for scores, target in zip(problem.score.detach().flatten(0, 1), mask.flatten(0, 1)):
        rank = scores.argsort(stable=True).argsort().float()  # distinct: of equal scores the later is higher
        rows = rank.expand(shape[2:]).masked_fill(future, -torch.inf)
        top = rows.topk(min(case.keep_window, case.seqlen_k), dim=-1)
        values = scores[top.indices].masked_fill(top.values == -torch.inf, -torch.inf)
        target.scatter_(-1, top.indices, values.to(case.dtype))
    return mask


def _masked_by_kv_head(problem: Problem, mask: Tensor) -> Stages:
    """Key/value heads become batch entries, so that the query heads of a group share one mask."""
    case, inputs = problem.case, problem.inputs()[:3]
    query, key, value = (x.transpose(1, 2).unflatten(1, (case.heads_kv, -1)).flatten(0, 1) for x in inputs)
    key, value = (x.expand(-1, case.group, -1, -1) for x in (key, value))  # [B * Hkv, group, Sk, D]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask.flatten(0, 1).unsqueeze(1))
    out = out.unflatten(0, (case.batch, case.heads_kv)).flatten(1, 2).transpose(1, 2)
    yield "forward"
    return (yield from _backward(problem, out, inputs, {"out": out.detach()}))


def _masked_by_query_head(problem: Problem, mask: Tensor) -> Stages:
    """As people write it: keys, values and mask repeated for every query head, the mask only as a view if
    there is one key/value head."""
    case, inputs = problem.case, problem.inputs()[:3]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    key, value = (x.repeat_interleave(case.group, dim=1) for x in (key, value))
    if case.heads_kv > 1 and case.group > 1:
        if mask.nbytes * case.group > MOST_REPEATED_BYTES:
            raise NotImplementedError("a mask for every query head is too large")
        mask = mask.repeat_interleave(case.group, dim=1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    yield "forward"
    return (yield from _backward(problem, out, inputs, {"out": out.detach()}))


def _backward(problem: Problem, out: Tensor, inputs: tuple[Tensor, ...], results: Results) -> Stages:
    """Without a score among the inputs it gets no gradient: a mask is a constant."""
    if problem.case.backward:
        gradients = torch.autograd.grad(out, inputs, problem.dout)
        yield "backward"
        results |= zip(("dq", "dk", "dv", "dscore"), gradients)
    return results


def _cuda_only(case: Case) -> str:
    return "" if case.device == "cuda" else "runs on CUDA"


def _mask_why_not(case: Case) -> str:
    pairs = case.batch * case.heads_kv * case.seqlen_q * case.seqlen_k
    if case.device != "cuda":
        return ""
    # The mask; of one head at a time: scores, the selected ones with their indices, and what is not causal.
    making = case.seqlen_q * case.seqlen_k * 5 + case.seqlen_q * min(case.keep_window, case.seqlen_k) * 28
    needed, there = pairs * case.dtype.itemsize + making, torch.cuda.mem_get_info()[1]
    if needed > MOST_MASK_BYTES * there:
        return f"its mask needs {needed / 2**30:.0f} GiB, the device has {there / 2**30:.0f}"
    passes = 4 + 10 * case.backward
    seconds = passes * case.head_dim * case.group * pairs / DENSE_FLOPS
    return "" if seconds <= MOST_SECONDS else f"a run would take about {seconds:.1f} s"


def _through_sdpa(description: str, backend: SDPBackend) -> Method:
    variants = {"enable_gqa": _dense(False, backend), "repeat_interleave": _dense(True, backend)}
    return Method(f"{description} through SDPA(is_causal=True), all keys", "none", variants, None, _cuda_only)


METHODS = {
    OURS: Method("flash_dmattn_func: selection, plan, forward; backward", "score", {"": _public}),
    STAGES: Method("its operators, one by one", "score", {"": _operators}),
    DENSE: Method(
        "scaled_dot_product_attention(is_causal=True), all keys",
        "none",
        {"enable_gqa": _dense(False), "repeat_interleave": _dense(True)},
    ),
    MASKED: Method(
        "scaled_dot_product_attention with the dense top-w mask",
        "rounded",
        {"by kv head": _masked_by_kv_head, "by query head": _masked_by_query_head},
        dense_mask,
        _mask_why_not,
    ),
    FLEX: Method("FlexAttention with the interval mask", "score", {"": _flex}, None, _cuda_only),
    CUDNN: _through_sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION),
    FLASH: _through_sdpa("FlashAttention", SDPBackend.FLASH_ATTENTION),
}


def run(
    solve: Solve, problem: Problem, state: Tensor | None, mark: Callable[[str], None] = lambda stage: None
) -> Results:
    """Drives a method; mark is called after every stage."""
    stages = solve(problem, state)
    while True:
        try:
            stage = next(stages)
        except StopIteration as end:
            return end.value
        mark(stage)
