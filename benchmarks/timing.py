"""Seconds and bytes of a method's stages, on the CPU and on CUDA."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from methods import METHODS, Solve, run
from problem import Problem, make_problem

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
HEAD_START_CYCLES = 2_000_000  # about a millisecond


def stage_seconds(solve: Solve, problem: Problem, state: Tensor | None) -> dict[str, float]:
    """Seconds of each stage of one run."""
    return timed(problem.case.device, lambda mark: run(solve, problem, state, mark))


def timed(device: str, work: Callable[[Callable[[str], None]], object]) -> dict[str, float]:
    """Seconds between the calls of mark(stage) within work, from its beginning on."""
    return (_cuda_timed if device == "cuda" else _cpu_timed)(work)


def _cpu_timed(work) -> dict[str, float]:
    marks = [("", time.perf_counter())]
    work(lambda stage: marks.append((stage, time.perf_counter())))
    return {stage: end - start for (_, start), (stage, end) in zip(marks, marks[1:])}


def _cuda_timed(work) -> dict[str, float]:
    """By events, without a synchronisation between the stages: the time of the device. L2 is flushed before the first
    stage, and the device then waits while the host queues what follows, as it does in a training step; what a
    call costs the host is a figure of its own (figures.py)."""
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(stage: str) -> None:
        marks.append((stage, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    _flush_buffer().zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    mark("")
    work(mark)
    torch.cuda.synchronize()
    return {stage: start.elapsed_time(end) / 1e3 for (_, start), (stage, end) in zip(marks, marks[1:])}


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def extra_bytes(problem: Problem, method: str, variant: str) -> dict[str, int]:
    """Peak memory of one run beyond its inputs, and how much of it is results. A mask counts, but not what
    its making takes. On the CPU it is the memory of the process."""
    setup, solve = METHODS[method].setup, METHODS[method].variants[variant]
    on_cuda = problem.case.device == "cuda"
    if not on_cuda:  # threads and code are not counted
        small = make_problem(replace(problem.case, batch=1, seqlen_q=256, seqlen_k=256, keep_window=64))
        run(solve, small, setup(small) if setup else None)
    before = torch.cuda.memory_allocated() if on_cuda else _process_status("VmRSS")
    state = setup(problem) if setup else None
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    results = run(solve, problem, state)
    peak = torch.cuda.max_memory_allocated() if on_cuda else _process_status("VmHWM")
    return {"extra": peak - before, "results": sum(x.numel() * x.element_size() for x in results.values())}


def _process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
