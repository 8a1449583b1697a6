"""Proof that green means something: with a known bug compiled in and switched on, the checks of this suite
fail.

The library with the bugs registers the same operators under `flash_dmattn_bugs`, plus `inject(number)`. A
compact fixed set of cases goes through selection, tiers A, B and C, the identities and the equal-bits checks,
first without a bug (all pass), then with each (nearly all are caught). What caught what is printed.
"""

import os
from pathlib import Path

import pytest
import torch

from cases import Case, make
from counters import count, note
from judge import failures_of
from kernels import OpsKernel, bit_for_bit
from oracle import expected
from probe import Probe, count_exactly, make_probe, tier_a
from properties import all_properties
from tiers import Failure

FILE = "libflash_dmattn_torch_bugs.so"
KERNEL = OpsKernel(
    "cpu with bugs", "cpu", ("f64", "f32", "bf16", "f16"), keeps_float32=True, namespace="flash_dmattn_bugs"
)
MISSED_AT_MOST = 1 / 20

BASE = dict(
    batch=2, seqlen_q=150, seqlen_k=230, heads_q=6, heads_kv=2, head_dim=32, keep_window=40, dlse=True
)
CASES = [
    Case(**BASE, score="minus_inf"),
    Case(**BASE, dtype="bf16", bias="separate", score="two_values"),
    Case(**(BASE | dict(seqlen_q=40, seqlen_k=50)), dtype="f64", score="disabled"),
    Case(**(BASE | dict(keep_window=None)), bias="separate", dtype="f16"),
    Case(**BASE, causal=False, score="quantised"),
    Case(lengths=((30, 70), (0, 3), (90, 90)), heads_q=4, heads_kv=2, head_dim=24, keep_window=16, logit=4.0),
    Case(**(BASE | dict(keep_window=None)), dense_bias="1 H Sq Sk", mask="1 1 Sq Sk"),
    Case(seqlen_q=3, seqlen_k=9000, heads_q=4, heads_kv=2, head_dim=8, keep_window=200),
    Case(seqlen_q=1100, seqlen_k=2600, heads_q=2, heads_kv=1, head_dim=8, keep_window=300, dtype="f32"),
]
PROBES = [
    Probe(
        dtype=dtype, run=run, keep_window=32, seqlen_q=150, seqlen_k=200, heads_q=6, heads_kv=2, head_dim=32
    )
    for dtype in ("f32", "bf16")
    for run in (1, 2)
]


def library() -> Path | None:
    """FLASH_DMATTN_BUGS_LIBRARY, or where CMake or make put it."""
    build = Path(__file__).parents[2] / "build"
    named = os.environ.get("FLASH_DMATTN_BUGS_LIBRARY")
    candidates = [Path(named)] if named else [build / FILE, build / "cpp" / FILE]
    return next((path for path in candidates if path.is_file()), None)


@pytest.fixture(scope="module")
def bugs(request):
    path = library()
    if path is None:
        if request.config.getoption("--no-bug-library"):
            pytest.skip("asked to do without the library with injectable bugs")
        pytest.fail(
            f"build/{FILE} is missing: configure with -DFLASH_DMATTN_BUILD_TESTING=ON "
            "-DFLASH_DMATTN_BUILD_TORCH=ON and build, set FLASH_DMATTN_BUGS_LIBRARY, or pass --no-bug-library"
        )
    torch.ops.load_library(path)
    yield KERNEL.ops
    KERNEL.ops.inject(0)


def prepared():
    """The problems and what is right about them: drawn and computed once for all bugs."""
    problems = [(make(case), case) for case in CASES]
    probes = [(make_probe(probe), probe) for probe in PROBES]
    return (
        [(problem, expected(problem)) for problem, _ in problems],
        [(problem, count_exactly(problem), probe) for problem, probe in probes],
    )


def everything_that_fails(cases, probes) -> list[Failure]:
    failures = []
    for problem, answer in cases:
        failures += failures_of(KERNEL, problem, answer)
        failures += all_properties(KERNEL, problem, KERNEL.run(problem))
    failures += causality(cases[0][0])
    for problem, counted, probe in probes:
        failures += tier_a(KERNEL.run(problem), counted, probe, KERNEL.keeps_float32)
    return failures


def causality(problem) -> list[Failure]:
    """Rows before a token that changes keep their bits."""
    changed, before = problem.value.clone(), KERNEL.run(problem)
    changed[:, -5:] *= 3
    after = KERNEL.run(problem.replace(value=changed))
    return (
        []
        if bit_for_bit(before["out"][:, :-5], after["out"][:, :-5])
        else [Failure("bitwise", "out", "causality")]
    )


def described(failures: list[Failure]) -> str:
    """ "tier B: dk, dv; property: dk": which checks failed on which tensors."""
    by_check: dict[str, set[str]] = {}
    for failure in failures:
        by_check.setdefault(failure.check.split(" (")[0], set()).add(failure.tensor)
    return "; ".join(f"{check}: {', '.join(sorted(tensors))}" for check, tensors in sorted(by_check.items()))


def test_injected_bugs_are_caught(bugs):
    cases, probes = prepared()
    names = bugs.bug_names().strip().splitlines()
    assert len(names) >= 20 and len(set(names)) == len(names)
    bugs.inject(0)
    clean = everything_that_fails(cases, probes)
    assert not clean, "without a bug: " + "; ".join(map(str, clean))
    missed = []
    for number, name in enumerate(names, start=1):
        bugs.inject(number)
        failures = everything_that_fails(cases, probes)
        bugs.inject(0)
        note(f"bug {number:2} {name}: {described(failures) or 'NOT CAUGHT'}")
        if failures:
            count("bug")
        else:
            missed.append(name)
    assert len(missed) <= MISSED_AT_MOST * len(names), f"not caught: {missed}"
    assert not everything_that_fails(cases, probes)  # nothing of a bug stays behind
