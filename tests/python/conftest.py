"""Options, the kernels under test, and what is printed at the end.

pytest tests/python                        the kernels of the CPU; a few minutes
pytest tests/python --kernel NAME          other kernels through the same tests (judge.py has the names)
pytest tests/python --hypothesis-profile long
"""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import counters  # noqa: E402
import narrowing  # noqa: E402
from emulated import EmulatedKernel  # noqa: E402
from judge import KERNELS  # noqa: E402
from kernels import OpsKernel  # noqa: E402

NATIVE = [name for name, kernel in KERNELS.items() if isinstance(kernel, OpsKernel)]

hypothesis.settings.register_profile(
    "ci",
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "long",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("emulated", hypothesis.settings.get_profile("ci"), max_examples=15)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--kernel", action="append", choices=NATIVE, help="what to test; default: cpu")
    parser.addoption(
        "--no-bug-library",
        action="store_true",
        help="do without the library that proves that injected bugs are caught",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    if config.getoption("--kernel") == ["cuda-emulated"] and not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("emulated")


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        names = metafunc.config.getoption("--kernel") or ["cpu"]
        kernels = [KERNELS[name] for name in names]
        narrowing.narrow(metafunc.definition, metafunc.module.__name__, kernels)
        metafunc.parametrize("kernel", kernels, ids=names, scope="session")


def pytest_collection_modifyitems(config, items):
    """The emulated kernels stand apart from the package: only what calls their operators is run on them."""

    def left_out(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        names = config.getoption("--kernel") or ["cpu"]
        emulated = isinstance(parameters.get("kernel", KERNELS[names[0]]), EmulatedKernel)
        judges = item.module.__name__ in narrowing.SUITES and "kernel" in parameters
        return emulated and (not judges or item.originalname in narrowing.NOT_EMULATED)

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state, the default backend and one thread.

    One, because most tests are small, and threads that wait for each other make them slow on a busy machine;
    what depends on the number of threads sets it.
    """
    os.environ.pop("FLASH_DMATTN_BACKEND", None)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    lines = counters.summary()
    if lines:
        terminalreporter.section("what was checked")
        for line in lines:
            terminalreporter.write_line(line)
