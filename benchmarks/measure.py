"""One case: every method is made ready and checked, then all take turns on the clock."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from check import check
from methods import METHODS, MOST_SECONDS, Solve, run
from problem import Problem, exact_expiry, make_problem, visible_pairs
from suites import FLEX, OURS, STAGES, Case
from timing import extra_bytes, stage_seconds, timed

MIN_RUNS = 3


@dataclass(frozen=True)
class Options:
    runs: int = 11
    warmup: int = 2
    seed: int = 0
    seconds: float = 90.0  # a case ends early after this long, but not before MIN_RUNS
    memory: bool = True


class Ready(NamedTuple):
    variant: str
    solve: Solve
    state: Tensor | None  # what the method's setup made
    setup_seconds: list[float]


def measure_case(case: Case, options: Options, measured: list[dict]) -> dict:
    """measured: the entries of earlier cases; attention to all keys is not timed again on the same shape."""
    entry: dict = {
        "name": case.name,
        "describe": case.describe(),
        "modes": case.modes,
        "sizes": [case.batch, case.heads, case.heads_kv, case.seqlen_q, case.seqlen_k, case.head_dim],
        "keep_window": case.keep_window,
        "score": case.score,
        "backward": case.backward,
        "half": case.half,
        "dense_key": repr(case.dense_key()),
        "checked": {},
        "not_run": {},
        "methods": {},
    }
    if case.device == "cuda" and not torch.cuda.is_available():
        entry["not_run"] = dict.fromkeys(case.methods, "no CUDA device")
        entry["wrong"] = "no CUDA device"
        return entry
    problem = make_problem(case, options.seed)
    expiry = exact_expiry(problem)
    ready: dict[str, Ready] = {}
    for name in case.methods:
        if not METHODS[name].windowed and _reuse(name, entry, measured):
            continue
        try:
            ready[name] = _prepare(problem, name, expiry, entry)
        except Exception as error:  # whatever a baseline fails with, the others are measured
            reason = _first_line(error)
            entry["not_run"][name] = reason
            if name in (OURS, STAGES):
                entry["wrong"] = f"{name}: {reason}"
        _collect(case.device)
    samples = _take_turns(problem, ready, options)
    for name in ready:
        pairs = visible_pairs(case, expiry if METHODS[name].windowed else None)
        found = summary(case, samples[name], ready[name].setup_seconds, pairs)
        entry["methods"][name] = {"variant": ready[name].variant, "pairs": pairs, **found}
    variants = {name: method.variant for name, method in ready.items()}
    ready.clear()
    if options.memory:
        for name, variant in variants.items():
            entry["methods"][name]["bytes"] = _memory(problem, name, variant, options)
    return entry


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {line}"


def _collect(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _reuse(name: str, entry: dict, measured: list[dict]) -> bool:
    for other in measured:
        same = other["dense_key"] == entry["dense_key"] and name in other["methods"]
        if same:
            entry["methods"][name] = other["methods"][name] | {"measured_with": other["name"]}
            return True
    return False


def _prepare(problem: Problem, name: str, expiry: Tensor, entry: dict) -> Ready:
    """Checks a method, which also warms it up, and picks its fastest variant."""
    method = METHODS[name]
    if reason := method.why_not(problem.case):
        raise NotImplementedError(reason)
    if name == FLEX:
        torch.compiler.reset()  # it is compiled for this shape, not for any
    state, setup_seconds = None, []
    if method.setup:
        for _ in range(2):  # the first also compiles and loads
            state = None
            state, seconds = _timed_setup(method.setup, problem)
            setup_seconds = [seconds]
    best, reasons = {}, []
    for variant, solve in method.variants.items():
        try:
            with warnings.catch_warnings(record=True) as complaints:
                warnings.simplefilter("always")
                results = run(solve, problem, state)
        except Exception as error:
            if len(method.variants) == 1:
                raise
            reasons += [_first_line(error), *(str(complaint.message) for complaint in complaints)]
            continue
        entry["checked"][name] = check(problem, results, expiry, method.bias)
        del results
        rounds = 2 if len(method.variants) > 1 else 1
        best[variant] = min(sum(stage_seconds(solve, problem, state).values()) for _ in range(rounds))
    if not best:
        raise NotImplementedError("; ".join(dict.fromkeys(" ".join(reason.split()) for reason in reasons)))
    variant = min(best, key=best.__getitem__)
    if best[variant] > MOST_SECONDS and problem.case.device == "cuda" and name not in (OURS, STAGES):
        raise NotImplementedError(f"a run takes {best[variant]:.1f} s")
    return Ready(variant, method.variants[variant], state, setup_seconds)


def _timed_setup(setup: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, float]:
    made: list[Tensor] = []

    def work(mark: Callable[[str], None]) -> None:
        made.append(setup(problem))
        mark("setup")

    seconds = timed(problem.case.device, work)["setup"]
    return made[0], seconds


def _take_turns(problem: Problem, ready: dict[str, Ready], options: Options) -> dict[str, list[dict]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    started = time.perf_counter()
    for index in range(-options.warmup, options.runs):
        if index >= MIN_RUNS and time.perf_counter() - started > options.seconds:
            break
        for name, method in ready.items():
            seconds = stage_seconds(method.solve, problem, method.state)
            if index >= 0:
                samples[name].append(seconds)
    return samples


def statistic(values: list[float]) -> dict:
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 3
    found = {"median": statistics.median(values), "p10": low, "p90": high}
    return {name: _short(value) for name, value in found.items()} | {"samples": [_short(x) for x in values]}


def _short(value: float) -> float:
    """To the digits that a measurement has."""
    return float(f"{value:.5g}")


def summary(case: Case, samples: list[dict[str, float]], setup_seconds: list[float], pairs: int) -> dict:
    """Medians and spread of every stage and of the whole, which begins with the making of a mask; GFLOP/s of
    the products over visible pairs."""
    columns = {"mask": setup_seconds} if setup_seconds else {}
    columns |= {stage: [sample[stage] for sample in samples] for stage in samples[0]}
    columns["total"] = [sum(sample.values()) + sum(setup_seconds) for sample in samples]
    seconds = {stage: statistic(values) for stage, values in columns.items()}
    operations = {"forward": 4 * case.head_dim * pairs, "backward": 10 * case.head_dim * pairs}
    gflops = {
        stage: n / seconds[stage]["median"] / 1e9 for stage, n in operations.items() if stage in seconds
    }
    return {"seconds": seconds, "gflops": gflops}


def _memory(problem: Problem, name: str, variant: str, options: Options) -> dict | None:
    """On the CPU in a process of its own, whose peak is this method's."""
    if problem.case.device == "cuda":
        return extra_bytes(problem, name, variant)
    case, threads = problem.case, torch.get_num_threads()
    driver = Path(__file__).with_name("run.py")
    command = [sys.executable, driver, "memory", case.name, name, variant, str(threads), str(options.seed)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        print(f"  memory of {name}: not measured: {finished.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(finished.stdout)
