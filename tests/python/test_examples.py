"""The examples that show the public functions, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_dmattn import explain, get_available_backends

from counters import count

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = (sys.executable, EXAMPLES / name, *arguments)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_quickstart():
    assert re.search(r"the dense form agrees: largest difference \d", run("quickstart.py"))
    count("property")


def takes_dense_forms(backend):
    on_gpu = backend == "cuda"
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    query = torch.zeros(1, 4, 2, 16, device=device, dtype=dtype)
    bias = torch.zeros(1, 2, 4, 4, device=device)
    return f"{backend}: runs" in explain(query, query, query, bias > -1, bias, backend=backend)


def test_dense_quickstart():
    """With the backend that is chosen, and with each one that takes a mask and a bias per query."""
    backends = [name for name in get_available_backends() if takes_dense_forms(name)]
    assert "reference" in backends
    for arguments in ((), *((name,) for name in backends)):
        output = run("dense_quickstart.py", *arguments)
        assert re.search(r"the two agree: largest difference \d", output)
        # Half of 256 keys, as each is seen by the queries after it; all 256 but for the first rows.
        seen, seen_instead = re.search(r"on average: (\d+); .*: (\d+)", output).groups()
        assert 110 < int(seen) < 146 and int(seen_instead) == 224
        count("property")
