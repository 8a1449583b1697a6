"""Whether the public function gives what the definition says, for the cases that are timed: what
forward_equivalence.py and backward_equivalence.py share.

Small cases are judged in every element against the float64 oracle, by the rules of the test suite
(tests/python); long ones, and scores that it does not draw, at sampled positions (check.py), both on inputs
drawn from --seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "python"))

import cases as oracle_cases  # noqa: E402
import counters  # noqa: E402
import judge  # noqa: E402
import oracle  # noqa: E402
from check import WrongResult, check  # noqa: E402
from kernels import PublicKernel  # noqa: E402
from methods import METHODS, run  # noqa: E402
from problem import exact_expiry, make_problem  # noqa: E402
from suites import DTYPE_NAMES, MODES, OURS, Case, chosen  # noqa: E402

DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}
ORACLE_PAIRS = {"cuda": 2**27, "cpu": 2**22}  # of query and key, over heads: seconds of float64 on the CPU
ORACLE_KEYS = 2**16  # the same of one row over a long cache
CPU_PAIRS = 2**23  # the sampled check of longer ones is left to GPUs


def main(suite: str, description: str | None) -> int:
    arguments = parse_arguments(description, MODES)
    return run_all(list(_checks(suite, arguments)), arguments.device)


def parse_arguments(description: str | None, test_types: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(DTYPES), default=default, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--test-type", action="append", default=[], choices=test_types, help="default: all")
    return parser.parse_args()


def run_all(checks: list[tuple[str, Callable[[], tuple[str, list[str]]]]], device: str) -> int:
    """Each check returns how it judged and what it found wrong. 0 if all is right."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    failed = 0
    for name, judged in checks:
        started = time.perf_counter()
        counters.worst.clear()
        try:
            how, wrong = judged()
        except Exception as error:  # one case that cannot run does not hide the others
            how, wrong = "did not run", [f"{type(error).__name__}: {error}"]
        failed += bool(wrong)
        errors = ", ".join(f"{tensor} {ratio:.2f}" for tensor, ratio in sorted(counters.worst.items()))
        seconds = time.perf_counter() - started
        print(f"{'WRONG' if wrong else 'right':5} {name:62} {how} {errors} ({seconds:.1f} s)", flush=True)
        for line in wrong:
            print(f"      {line}")
    print(
        f"{len(checks) - failed} of {len(checks)} right; numbers: worst errors as fractions of their bounds"
    )
    return 1 if failed or not checks else 0


def _checks(suite: str, arguments: argparse.Namespace):
    for case in chosen(suite, arguments.test_type):
        pairs = case.batch * case.heads * case.seqlen_q * case.seqlen_k
        if arguments.device == "cpu" and pairs > CPU_PAIRS:
            continue
        short = pairs <= ORACLE_PAIRS[arguments.device] and case.seqlen_k <= ORACLE_KEYS
        small = short and case.score == "iid"
        for dtype in DTYPES[arguments.device]:
            of_type = dataclasses.replace(case, dtype=dtype, device=arguments.device)
            judged = _by_oracle if small else _by_samples
            name = f"{case.name} {DTYPE_NAMES[dtype]}"
            yield name, lambda judged=judged, of_type=of_type: judged(of_type, arguments.seed)


def public_kernel(device: str, has_backward: bool) -> PublicKernel:
    """The package as users call it; its CPU kernels keep P and dS in float32."""
    dtypes = tuple(DTYPE_NAMES[dtype] for dtype in DTYPES[device])
    return PublicKernel(f"public-{device}", device, dtypes, device == "cpu", has_backward=has_backward)


def _by_oracle(case: Case, seed: int) -> tuple[str, list[str]]:
    drawn = oracle_cases.make(
        oracle_cases.Case(
            batch=case.batch,
            seqlen_q=case.seqlen_q,
            seqlen_k=case.seqlen_k,
            heads_q=case.heads,
            heads_kv=case.heads_kv,
            head_dim=case.head_dim,
            dtype=DTYPE_NAMES[case.dtype],
            keep_window=case.keep_window,
            seed=seed,
        )
    )
    kernel = public_kernel(case.device, case.backward)
    failures = judge.failures_of(kernel, drawn.to(case.device), oracle.expected(drawn))
    return "every element:", [str(failure) for failure in failures]


def _by_samples(case: Case, seed: int) -> tuple[str, list[str]]:
    problem = make_problem(case, seed)
    results = run(METHODS[OURS].variants[""], problem, None)
    try:
        return f"sampled: {check(problem, results, exact_expiry(problem), METHODS[OURS].bias)}", []
    except WrongResult as wrong:
        return "sampled:", [str(wrong)]
