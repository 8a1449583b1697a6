"""P8: memory grows with N, not with N x N. Peak resident memory of a process of its own, from the kernel's
accounts."""

import json
import os
import subprocess
import sys

import pytest

from counters import note

MEASURE = """
import json, sys, time
import torch
import flash_dmattn

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

def forget_the_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def tensors(length):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator).requires_grad_()
    return make(1, length, 2, 64), make(1, length, 1, 64), make(1, length, 1, 64), make(1, 1, length)

def call(query, key, value, bias):
    options = dict(attn_bias=bias, keep_window_size=1024, is_causal=True)
    out = flash_dmattn.flash_dmattn_func(query, key, value, **options)
    out.sum().backward()

call(*tensors(2048))  # code, threads and libraries are loaded
leaves = tensors(int(sys.argv[1]))
forget_the_peak()
before = status("VmRSS")
started = time.perf_counter()
call(*leaves)
seconds = time.perf_counter() - started
# out and the gradients, float32
results = 4 * (2 * leaves[0].numel() + 2 * leaves[1].numel() + leaves[3].numel()) / 2**20
print(json.dumps({"extra": status("VmHWM") - before, "results": results, "seconds": seconds}))
"""


def measure(length):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(length)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode != 0 and "clear_refs" in run.stderr:
        pytest.skip("this system does not let a process forget its peak memory")
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.slow
def test_forward_and_backward_over_131072_tokens(kernel):
    """H2 Hkv1 D64 w1024 float32: under 300 MB beyond the inputs, results included. N x N floats would be 68
    GB."""
    if kernel.device != "cpu":
        pytest.skip("counts the memory of the CPU")
    measured = measure(131072)
    note(
        f"memory at N = 131072: {measured['extra']:.0f} MB beyond the inputs, of which "
        f"{measured['results']:.0f} MB are out and gradients ({measured['seconds']:.1f} s)"
    )
    assert measured["extra"] < 300
    assert measured["extra"] > measured["results"]  # or nothing was measured


@pytest.mark.slow
def test_memory_is_linear(kernel):
    if kernel.device != "cpu":
        pytest.skip("counts the memory of the CPU")
    short, long = measure(16384)["extra"], measure(65536)["extra"]
    assert long < 4.5 * short + 30, (short, long)
