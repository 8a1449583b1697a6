"""The benchmark driver.

    python benchmarks/run.py list                                  the cases and the methods
    python benchmarks/run.py --suite cpu --out results/cpu.json    measure a suite
    python benchmarks/run.py --case cpu-forward-8192-d64           or single cases
    python benchmarks/run.py plot results/cpu.json                 draw what was measured

Every method is checked on the inputs it is timed on; a wrong one is not timed, and the exit status says so.
README.md explains how to read the numbers. Fronts: forward_performance.py, backward_performance.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import environment
import report
from measure import MIN_RUNS, Options, measure_case
from methods import METHODS
from problem import make_problem
from suites import CASES, MODES, SUITES, chosen
from timing import extra_bytes


def main(given: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if given is None else given)
    if arguments.command == "list":
        return list_all()
    if arguments.command == "plot":
        from plot import draw  # needs matplotlib

        draw(arguments.file, arguments.out or arguments.file.with_suffix(".png"))
        return 0
    if arguments.command == "memory":
        torch.set_num_threads(arguments.threads)
        case = next(case for case in CASES if case.name == arguments.case_name)
        print(
            json.dumps(extra_bytes(make_problem(case, arguments.seed), arguments.method, arguments.variant))
        )
        return 0
    return measure(arguments)


def measure(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = Options(
        arguments.runs, arguments.warmup, arguments.seed, arguments.seconds, not arguments.no_memory
    )
    found: dict = {
        "environment": environment.describe(),
        "options": vars(options),
        "skipped": [],
        "cases": [],
    }
    print("\n".join(f"{name}: {value}" for name, value in found["environment"].items()))
    print(f"\n{report.LEGEND}\n{report.HEADER}", flush=True)
    started = time.perf_counter()
    for case in chosen(arguments.suite, arguments.test_type, arguments.case):
        found["seconds"] = time.perf_counter() - started
        if found["seconds"] > arguments.budget_seconds:
            found["skipped"].append(case.name)
            continue
        entry = measure_case(case, options, found["cases"])
        found["cases"].append(entry)
        report.print_case(entry, found["cases"])
        write(arguments.out, found)  # after every case: an interrupted run keeps what it has
    if found["skipped"]:
        write(arguments.out, found)
        print(f"\nNot measured within {arguments.budget_seconds:g} s: {', '.join(found['skipped'])}")
    failed = [entry["wrong"] for entry in found["cases"] if "wrong" in entry]
    if failed:
        names = ", ".join(entry["name"] for entry in found["cases"] if "wrong" in entry)
        print(f"\nNot everything was measured: {names}", file=sys.stderr)
    return bool(failed)


def write(path: Path | None, found: dict) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def parse_arguments(given: list[str]) -> argparse.Namespace:
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
    for name in ("threads", "seed"):
        memory.add_argument(name, type=int)
    _add_measuring(commands.add_parser("run", help="measure (the default)"))
    if not given or given[0] not in (*commands.choices, "-h", "--help"):
        given = ["run", *given]
    arguments = parser.parse_args(given)
    if arguments.command == "run" and arguments.runs < MIN_RUNS:
        parser.error(f"--runs: got {arguments.runs}, expected at least {MIN_RUNS}")
    if arguments.command == "run" and not (arguments.suite or arguments.case):
        parser.error("nothing to measure: give --suite or --case; `list` shows them")
    return arguments


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    default = Options()
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument(
        "--test-type", action="append", default=[], choices=MODES, help="only these tables of the suite"
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", default=[], choices=names, metavar="NAME")
    parser.add_argument(
        "--runs", type=int, default=default.runs, help="timed repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=int, default=default.warmup, help="repetitions before them (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the inputs (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=default.seconds,
        help=f"a case ends early after this long, but not before {MIN_RUNS} runs (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="no case begins after this long"
    )
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--out", type=Path, help="JSON file for the results")


def list_all() -> int:
    for case in CASES:
        beside = ", ".join(case.baselines) or "nothing"
        print(f"{case.name:52} {case.suite:8} {', '.join(case.modes)}; beside {beside}")
    print()
    for name, method in METHODS.items():
        print(f"{name:26} {method.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
