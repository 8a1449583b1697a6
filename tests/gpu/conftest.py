"""What only a GPU can show; run.py runs it together with tests/python.

pytest tests/gpu
pytest tests/gpu --kernel cuda-emulated --shrink 1000 --repeats 3     tries the tests, without a GPU
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "python"), str(ROOT / "benchmarks")]

import counters  # noqa: E402
from judge import KERNELS  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kernel", choices=[*KERNELS], default="cuda", help="default: cuda")
    parser.addoption("--repeats", type=int, default=1000, help="of the determinism tests")
    parser.addoption("--shrink", type=int, default=1, help="divides the sizes of the large shapes")


@pytest.fixture(scope="session")
def kernel(request):
    kernel = KERNELS[request.config.getoption("--kernel")]
    if kernel.device == "cuda" and not torch.cuda.is_available():
        pytest.fail("no CUDA device")
    return kernel


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter):
    for line in counters.summary():
        terminalreporter.write_line(line)
