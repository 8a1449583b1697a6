"""The benchmark driver.

    python benchmarks/run.py list                                  the cases and the methods
    python benchmarks/run.py --suite cpu --out results/cpu.json    measure a suite
    python benchmarks/run.py --case cpu-forward-8192-d64           or single cases
    python benchmarks/run.py plot results/cpu.json                 draw what was measured

Every method is checked on the inputs it is timed on; a wrong one is not timed, and the exit status says so.
README.md explains how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import environment
from cases import CASES, OURS, Case, Problem, make_problem
from check import WrongResult, check
from flash_dmattn import reference
from methods import METHODS, Solve, run
from timing import extra_bytes, stage_seconds

MIN_ROUNDS = 3


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "list":
        return list_all()
    if arguments.command == "plot":
        from plot import draw  # needs matplotlib

        draw(arguments.file, arguments.out or arguments.file.with_suffix(".png"))
        return 0
    if arguments.command == "memory":
        torch.set_num_threads(arguments.threads)
        print(json.dumps(extra_bytes(_named(arguments.case_name), arguments.method, arguments.variant)))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = [case for case in CASES if case.suite == arguments.suite or case.name in arguments.case]
    report: dict = {"environment": environment.describe(), "cases": []}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()))
    for case in chosen:
        print(f"\n{case.name}: {case.describe()}", flush=True)
        entry = measure_case(case, arguments)
        report["cases"].append(entry)
        print_case(entry, report["cases"])
        if arguments.out:  # after every case: an interrupted run keeps what it has
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [entry["name"] for entry in report["cases"] if "wrong" in entry]
    if failed:
        print(f"\nNot everything was measured: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="[list | plot | run]")
    commands.add_parser("list", help="the cases and the methods")
    plot = commands.add_parser("plot", help="draw a result file")
    plot.add_argument("file", type=Path)
    plot.add_argument("--out", type=Path, help="default: the file's name with .png")
    memory = commands.add_parser("memory", help="peak memory of one method, for which `run` starts processes")
    for name in ("case_name", "method", "variant"):
        memory.add_argument(name)
    memory.add_argument("threads", type=int)
    measure = commands.add_parser("run", help="measure (the default)")
    measure.add_argument("--suite", choices=sorted({case.suite for case in CASES}))
    measure.add_argument(
        "--case", action="append", default=[], choices=[case.name for case in CASES], metavar="NAME"
    )
    measure.add_argument("--rounds", type=int, default=11, help="repetitions of every method (default: 11)")
    measure.add_argument(
        "--seconds",
        type=float,
        default=90,
        help=f"a case ends early after this long, but not before {MIN_ROUNDS} rounds",
    )
    measure.add_argument("--threads", type=int, help="default: PyTorch's")
    measure.add_argument("--no-memory", action="store_true", help="leave the memory out")
    measure.add_argument("--out", type=Path, help="JSON file for the results")
    given = sys.argv[1:]
    if not given or given[0] not in (*commands.choices, "-h", "--help"):
        given = ["run", *given]
    arguments = parser.parse_args(given)
    if arguments.command == "run" and arguments.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: got {arguments.rounds}, expected at least {MIN_ROUNDS}")
    if arguments.command == "run" and not (arguments.suite or arguments.case):
        parser.error("nothing to measure: give --suite or --case; `list` shows them")
    return arguments


def list_all() -> int:
    for case in CASES:
        beside = ", ".join(case.baselines) or "nothing"
        print(f"{case.name:26} {case.suite:6} {case.describe()}; beside {beside}")
    print()
    for name, method in METHODS.items():
        print(f"{name:26} {method.description}")
    return 0


def _named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def measure_case(case: Case, arguments: argparse.Namespace) -> dict:
    entry: dict = {
        "name": case.name,
        "describe": case.describe(),
        "half": case.half,
        "checked": {},
        "not_run": {},
        "methods": {},
    }
    if case.device == "cuda" and not torch.cuda.is_available():
        entry["not_run"][OURS] = entry["wrong"] = "no CUDA device"
        return entry
    problem = make_problem(case)
    expiry = reference.select_keys(problem.score, case.keep_window)
    lifetimes = expiry - torch.arange(case.seqlen, device=case.device)
    pairs = {
        True: int(lifetimes.sum()) * (case.heads // case.heads_kv)
    }  # visible ones, windowed or not, of all heads
    pairs[False] = case.batch * case.heads * case.seqlen * (case.seqlen + 1) // 2
    ready: dict[str, tuple[str, Solve]] = {}
    for name in case.methods:
        try:
            ready[name] = prepare(problem, name, expiry, entry)
        except (WrongResult, NotImplementedError, ImportError, RuntimeError, ValueError) as error:
            entry["not_run"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, WrongResult) or name == OURS:
                entry["wrong"] = f"{name}: {entry['not_run'][name]}"
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    started = time.perf_counter()
    for index in range(arguments.rounds):
        if index >= MIN_ROUNDS and time.perf_counter() - started > arguments.seconds:
            break
        for name, (_, solve) in ready.items():
            samples[name].append(stage_seconds(solve, problem))
    for name, (variant, _) in ready.items():
        visible = pairs[METHODS[name].windowed]
        entry["methods"][name] = {
            "variant": variant,
            "pairs": visible,
            **summary(case, samples[name], visible),
        }
    del problem
    if not arguments.no_memory:
        for name, (variant, _) in ready.items():
            entry["methods"][name]["bytes"] = _memory_of(case, name, variant)
    return entry


def prepare(problem: Problem, name: str, expiry: Tensor, entry: dict) -> tuple[str, Solve]:
    """Checks a method, which also warms it up, and picks its fastest variant."""
    method = METHODS[name]
    if reason := method.why_not(problem.case):
        raise NotImplementedError(reason)
    best = {}
    for variant, solve in method.variants.items():
        results = run(solve, problem)
        entry["checked"][name] = check(problem, results, expiry if method.windowed else None)
        del results
        if len(method.variants) > 1:
            best[variant] = min(sum(stage_seconds(solve, problem).values()) for _ in range(2))
    variant = min(best, key=best.__getitem__) if best else next(iter(method.variants))
    return variant, method.variants[variant]


def summary(case: Case, samples: list[dict[str, float]], pairs: int) -> dict:
    """Medians and spread of every stage and of the whole; GFLOP/s of the products over visible pairs."""
    columns = {stage: [sample[stage] for sample in samples] for stage in samples[0]}
    columns["total"] = [sum(sample.values()) for sample in samples]
    seconds = {}
    for stage, values in columns.items():
        low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
        seconds[stage] = {"median": statistics.median(values), "p10": low, "p90": high, "samples": values}
    operations = {"forward": 4 * case.head_dim * pairs, "backward": 10 * case.head_dim * pairs}
    gflops = {
        stage: n / seconds[stage]["median"] / 1e9 for stage, n in operations.items() if stage in seconds
    }
    return {"seconds": seconds, "gflops": gflops}


def _memory_of(case: Case, name: str, variant: str) -> dict | None:
    command = [sys.executable, __file__, "memory", case.name, name, variant, str(torch.get_num_threads())]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        print(f"  memory of {name}: not measured: {finished.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(finished.stdout)


def print_case(entry: dict, entries: list[dict]) -> None:
    for name, reason in entry["not_run"].items():
        print(f"  {name}: not run: {reason}")
    ours = entry["methods"].get(OURS)
    for name, found in entry["methods"].items():
        print("  " + _line(name, found))
        if ours and name != OURS:
            ratio = found["seconds"]["total"]["median"] / ours["seconds"]["total"]["median"]
            print(f"    {OURS} is {ratio:.2f} times as fast")
    if not ours:
        return
    seconds = ours["seconds"]
    print(
        f"  selection: {seconds['select']['median'] / seconds['forward']['median']:.1%} of the forward's time"
    )
    half = next((e["methods"].get(OURS) for e in entries if e["name"] == entry["half"]), None)
    if half:
        ratio = seconds["total"]["median"] / half["seconds"]["total"]["median"]
        print(f"  {ratio:.2f} times the time of {entry['half']}, half as long")


def _line(name: str, found: dict) -> str:
    def milliseconds(stage: str) -> str:
        text = f"{stage} {1e3 * found['seconds'][stage]['median']:.1f}"
        if stage in found["gflops"]:
            rate = found["gflops"][stage]
            text += f" ({rate:.0f} GFLOP/s)" if rate < 1000 else f" ({rate / 1000:.0f} TFLOP/s)"
        return text

    total = found["seconds"]["total"]
    spread = f"[{1e3 * total['p10']:.1f}, {1e3 * total['p90']:.1f}], {len(total['samples'])} rounds"
    stages = ", ".join(milliseconds(stage) for stage in found["seconds"] if stage != "total")
    line = f"{name + ' ' + found['variant']:30} {1e3 * total['median']:9.1f} ms {spread}: {stages} ms"
    if memory := found.get("bytes"):
        line += f"; {memory['extra'] / 1e6:.0f} MB extra, {memory['results'] / 1e6:.0f} of them results"
    return line


if __name__ == "__main__":
    sys.exit(main())
