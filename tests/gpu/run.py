"""The whole suite on a GPU with one command: tests/gpu and all of tests/python that judges kernels, in
processes side by side, and a report of what was checked.

    python tests/gpu/run.py                            writes tests/gpu/results/gpu.json; exit code 0 or 1
    python tests/gpu/run.py -- -k attention            further arguments for pytest

The report holds counts, the worst error of each tensor as a fraction of its bound, the GPU, the commit; a
failure is listed with one line that runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ALONE = ("test_large.py", "test_determinism.py", "test_torch.py")  # a process each, started first


def main() -> int:
    arguments = parse_arguments()
    environment = child_environment()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for name, command in commands(arguments, Path(folder)).items():
            log = open(Path(folder, f"{name}.log"), "w")
            processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        late = wait(processes, started + arguments.timeout)
        shares = {name: outcome(Path(folder), name, name in late) for name in processes}
    report = {"environment": describe(environment), **merged(shares), "seconds": time.time() - started}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    return 1 if report["failures"] or not report["tests"]["passed"] else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="cuda")
    default = max(1, len(os.sched_getaffinity(0)) - 2)
    parser.add_argument(
        "--processes", type=int, default=default, help="for tests/python (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=460, help="seconds for all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest")
    return parser.parse_args()


def child_environment() -> dict[str, str]:
    """One thread each, as there are as many processes as cores; the package of the source tree, if it is
    built."""
    built = [str(ROOT / "python")] if (ROOT / "python" / "flash_dmattn" / "lib").is_dir() else []
    path = [*built, str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    number = arguments.processes
    shares = {Path(file).stem: [str(HERE / file)] for file in ALONE}
    shares |= {
        f"python-{i}": [str(ROOT / "tests" / "python"), "--shard", f"{i}/{number}"] for i in range(number)
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "suite_plugin", "-p", "no:cacheprovider"]
    return {
        name: [*pytest, *what, "--kernel", arguments.kernel, "--share-report", str(folder / f"{name}.json")]
        + arguments.pytest
        for name, what in shares.items()
    }


def wait(processes: dict[str, subprocess.Popen], deadline: float) -> set[str]:
    """The names of those that had to be ended."""
    late = set()
    for name, process in processes.items():
        try:
            process.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            late.add(name)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return late


def outcome(folder: Path, name: str, late: bool) -> dict:
    file, log = folder / f"{name}.json", (folder / f"{name}.log").read_text()
    if file.is_file():
        return json.loads(file.read_text())
    why = "took too long and was ended" if late else "ended without a report"
    tail = " | ".join(log.strip().splitlines()[-8:])
    missing = {"test": name, "why": f"the process {why}: {tail}", "reproduce": "python tests/gpu/run.py"}
    return {
        "failures": [missing],
        "tests": {"failed": 1},
        "counts": {},
        "worst": {},
        "notes": [],
        "slowest": [],
    }


def merged(shares: dict[str, dict]) -> dict:
    tests, counts, worst = Counter(), Counter(), {}
    for share in shares.values():
        tests.update(share["tests"])
        counts.update(share["counts"])
        for tensor, ratio in share["worst"].items():
            worst[tensor] = max(ratio, worst.get(tensor, 0.0))
    return {
        "tests": dict(tests),
        "counts": dict(sorted(counts.items())),
        "worst": dict(sorted(worst.items())),
        "failures": [failure for share in shares.values() for failure in share["failures"]],
        "notes": [note for share in shares.values() for note in share["notes"]],
        "processes": {name: share.get("seconds") for name, share in shares.items()},
        "slowest": sorted((x for share in shares.values() for x in share["slowest"]), key=lambda x: -x[1])[
            :15
        ],
    }


def describe(environment: dict[str, str]) -> dict:
    """As in benchmark results; in a process of its own, so that this one needs no GPU."""
    code = "import json, environment; print(json.dumps(environment.describe()))"
    path = os.pathsep.join([str(ROOT / "benchmarks"), environment["PYTHONPATH"]])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"unknown": done.stderr.strip()[-300:]}


def show(report: dict) -> None:
    sys.path.append(str(ROOT / "tests" / "python"))
    from counters import LABELS

    for failure in report["failures"]:
        print(f"FAILED {failure['test']}\n  {failure['why']}\n  reproduce: {failure['reproduce']}")
    for kind, number in report["counts"].items():
        print(f"{number:>15,} {LABELS[kind]}")
    print("worst errors as fractions of their bounds:", end=" ")
    print(", ".join(f"{tensor} {ratio:.3f}" for tensor, ratio in report["worst"].items()) or "none")
    print(
        "slowest:",
        ", ".join(f"{test.split('/')[-1]} {seconds:.0f} s" for test, seconds in report["slowest"][:5]),
    )
    tests = ", ".join(f"{number} {kind}" for kind, number in sorted(report["tests"].items()))
    where = report["environment"]
    print(f"{tests} in {report['seconds']:.0f} s; {where.get('gpu', 'no GPU')}, commit {where.get('commit')}")


if __name__ == "__main__":
    sys.exit(main())
