"""Seconds and bytes of a method's stages, on the CPU and on CUDA."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cases import Case, Problem, make_problem
from methods import METHODS, Solve, run

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


def stage_seconds(solve: Solve, problem: Problem) -> dict[str, float]:
    """Seconds of each stage of one run."""
    measure = _cuda_seconds if problem.case.device == "cuda" else _cpu_seconds
    return measure(solve, problem)


def _cpu_seconds(solve: Solve, problem: Problem) -> dict[str, float]:
    marks = [("", time.perf_counter())]
    run(solve, problem, lambda stage: marks.append((stage, time.perf_counter())))
    return {stage: end - start for (_, start), (stage, end) in zip(marks, marks[1:])}


def _cuda_seconds(solve: Solve, problem: Problem) -> dict[str, float]:
    """By events, without a synchronisation between the stages; L2 is flushed before the first one."""
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(stage: str) -> None:
        marks.append((stage, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    mark("")
    run(solve, problem, mark)
    torch.cuda.synchronize()
    return {stage: start.elapsed_time(end) / 1e3 for (_, start), (stage, end) in zip(marks, marks[1:])}


def extra_bytes(case: Case, method: str, variant: str) -> dict[str, int]:
    """Peak memory of one run beyond its inputs, and how much of it is results. On the CPU: of the process."""
    problem, solve = make_problem(case), METHODS[method].variants[variant]
    if case.device == "cuda":
        run(solve, problem)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(solve, problem)
        peak = torch.cuda.max_memory_allocated()
    else:
        small = make_problem(
            Case(
                "small",
                "",
                256,
                64,
                case.heads,
                case.heads_kv,
                case.head_dim,
                case.backward,
                dtype=case.dtype,
            )
        )
        run(solve, small)  # threads and code are not counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _process_status("VmRSS")
        results = run(solve, problem)
        peak = _process_status("VmHWM")
    return {"extra": peak - before, "results": sum(x.numel() * x.element_size() for x in results.values())}


def _process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
