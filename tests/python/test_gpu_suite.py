"""The suite for a GPU (tests/gpu) runs here on other kernels and smaller shapes, and its reports say what
happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated

SUITE = Path(__file__).parents[1] / "gpu"


def run(tmp_path, *arguments):
    """The outcome of a share of tests/gpu, and what was printed."""
    report = tmp_path / "share.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "suite_plugin", "-p", "no:cacheprovider", SUITE]
    paths = [str(SUITE), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "--share-report", report, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert report.is_file(), done.stdout + done.stderr
    return json.loads(report.read_text()), done.stdout


def test_the_suite_passes_where_there_is_no_gpu(tmp_path):
    kernel = "cuda-emulated" if emulated.library() else "cpu"
    found, output = run(tmp_path, "--kernel", kernel, "--shrink", "5000", "--repeats", "2")
    assert found["tests"]["failed"] == 0 and found["tests"]["passed"] >= 13, output
    assert found["counts"]["bitwise"] >= 50 and 0 < found["worst"]["dk"] < 1


def test_a_failure_comes_with_a_line_that_runs_it_again(tmp_path):
    found, output = run(tmp_path, "--kernel", "cpu", "--shrink", "0", "-k", "batch_stride")
    (failure,) = found["failures"]
    assert found["tests"] == {"passed": 0, "failed": 1, "skipped": 0}, output
    assert "ZeroDivisionError" in failure["why"]
    assert failure["reproduce"].startswith("python -m pytest 'tests/gpu/test_large.py::test_a_batch_stride")
    assert failure["reproduce"].endswith("--kernel cpu")


def test_shares_together_are_the_whole(tmp_path):
    options = ("--kernel", "cpu", "--repeats", "1", "-k", "same_bits")
    shares = [run(tmp_path, *options, "--shard", f"{i}/2")[0] for i in range(2)]
    assert [share["tests"]["passed"] for share in shares] == [3, 3]
    ran = {name for share in shares for name, _ in share["slowest"]}
    assert len(ran) == 6
