"""The benchmark driver times a right kernel and refuses to time a wrong one."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Runs the driver with one result of our own method changed. In a process of its own: there are modules of the
# same names here and there.
DRIVER = """
import sys

folder, changed, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
import methods, run

def change(solve):
    def solve_wrongly(problem, state):
        results = yield from solve(problem, state)
        if changed in results:
            results[changed] = results[changed] + (results[changed] / 100).to(results[changed].dtype)
        return results
    return solve_wrongly

for name in (methods.OURS, methods.STAGES):
    method = methods.METHODS[name]
    variants = {variant: change(solve) for variant, solve in method.variants.items()}
    methods.METHODS[name] = method._replace(variants=variants)
sys.exit(run.main())
"""


@pytest.mark.parametrize("changed", ["nothing", "out", "dscore", "expiry"])
def test_refuses_to_time_what_is_wrong(changed):
    arguments = ["--suite", "smoke", "--runs", "3", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, BENCHMARKS, changed, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (0 if changed == "nothing" else 1), done.stdout + done.stderr
    assert ("Not everything was measured: smoke" in done.stderr) == (changed != "nothing")
