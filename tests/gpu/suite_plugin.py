"""A pytest plugin for run.py: runs one share of the tests that judge a kernel, and writes what came of it."""

import json
import re
import time
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th test, from the I-th on")
    parser.addoption("--share-report", type=Path, help="JSON file for the outcome")


def pytest_configure(config):
    config.pluginmanager.register(Outcome(config), "suite_plugin_outcome")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    from narrowing import SUITES  # conftest.py has found it

    index, number = map(int, config.getoption("--shard").split("/"))
    here = Path(__file__).parent
    judging = [item for item in items if item.path.parent == here or item.module.__name__ in SUITES]
    kept = [item for item in judging if "kernel" in item.fixturenames][index::number]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


class Outcome:
    def __init__(self, config):
        self.path = config.getoption("--share-report")
        named = config.getoption("--kernel")  # of tests/python: a list
        self.kernel = named[0] if isinstance(named, list) else named
        self.started = time.time()
        self.tests = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed or (report.when == "call" and report.passed) or report.skipped:
            self.tests[report.outcome] += 1
        if report.failed:
            self.failures.append(self.failure(report.nodeid, report.longreprtext))

    def pytest_collectreport(self, report):
        if report.failed:
            self.tests["failed"] += 1
            self.failures.append(self.failure(report.nodeid, report.longreprtext))

    def pytest_sessionfinish(self, exitstatus):
        import counters

        found = {
            "exit": int(exitstatus),
            "tests": self.tests,
            "failures": self.failures,
            "counts": dict(counters.counts),
            "worst": counters.worst,
            "notes": counters.notes,
            "slowest": sorted(self.seconds.items(), key=lambda item: -item[1])[:5],
            "seconds": time.time() - self.started,
        }
        if self.path:
            self.path.write_text(json.dumps(found))

    def failure(self, test: str, text: str) -> dict[str, str]:
        """The line that a check names to run it again, or pytest's own."""
        reproductions = re.findall(r"^E? *reproduce: (.*)$", text, re.MULTILINE)
        reasons = re.findall(r"^E +(.*)$", text, re.MULTILINE) or text.strip().splitlines()[-1:]
        again = reproductions[0] if reproductions else f"python -m pytest '{test}' --kernel {self.kernel}"
        return {"test": test, "why": " | ".join(reasons[:3])[:600], "reproduce": again}
