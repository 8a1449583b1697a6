"""What a call must not depend on or touch: memory it did not write, memory around its tensors, its inputs.

PyTorch can fill every allocation with NaN (and the largest integer); glibc can fill it with any byte. Results
must have the same bits under both. Guard bands around the inputs hold NaN: reading one poisons a result,
writing one shows.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cases import Case, make
from counters import count
from kernels import bit_for_bit

BASE = dict(
    batch=2, seqlen_q=100, seqlen_k=170, heads_q=4, heads_kv=2, head_dim=40, keep_window=32, dlse=True
)
CASES = [
    *(Case(**BASE, dtype=dtype, score="minus_inf") for dtype in ("f64", "f32", "bf16", "f16")),
    Case(**BASE, score="disabled"),
    Case(**BASE, causal=False),
    Case(**(BASE | dict(keep_window=None)), bias="separate"),
    Case(
        lengths=((3, 9), (0, 5), (0, 0), (70, 130)),
        heads_q=6,
        heads_kv=2,
        head_dim=33,
        keep_window=16,
        dlse=True,
    ),
    Case(**(BASE | dict(batch=1, seqlen_q=2200, seqlen_k=2200, heads_q=2, heads_kv=1, keep_window=64))),
    Case(**(BASE | dict(seqlen_q=0))),
    *(Case(**BASE, dtype=dtype, dense_bias="B Hkv Sq Sk", mask="1 H Sq Sk") for dtype in ("f64", "bf16")),
    Case(**BASE, dense_bias="1 1 Sq Sk", dense_dtype="bf16"),
    Case(**(BASE | dict(keep_window=None)), dense_bias="B H 1 Sk", mask="B 1 1 Sk", dtype="f16"),
    Case(**(BASE | dict(seqlen_q=3, seqlen_k=0)), causal=False),
]
with_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@contextmanager
def uninitialised_memory_is_nan(monkeypatch):
    """For torch.empty in Python, and for the allocations of operators behind the dispatcher."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(torch, "empty", poisoned)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        monkeypatch.undo()
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@with_cases
def test_nan_in_uninitialised_memory(kernel, case, monkeypatch):
    problem = make(case).to(kernel.device)
    clean = kernel.run(problem)
    with uninitialised_memory_is_nan(monkeypatch):
        assert torch.empty(3).isnan().all() and torch.empty_like(problem.query).isnan().all()
        with torch.profiler.profile() as profile:
            poisoned = kernel.run(problem)
    events = {event.key: event.count for event in profile.key_averages()}
    allocations = events.get("aten::empty", 0) + events.get("aten::empty_strided", 0)
    assert events.get("aten::fill_", 0) >= allocations > 0, "the operators' own memory was not filled"
    for name, tensor in clean.items():
        assert bit_for_bit(tensor, poisoned[name]), name
        count("bitwise")


PRINT_DIGESTS = """
import hashlib, sys
import torch
sys.path.insert(0, {directory!r})
from judge import KERNELS
from cases import make
from narrowing import fit
from test_poison import CASES
kernel = KERNELS[{kernel!r}]
for case in (fit(case, kernel) for case in CASES):
    for name, tensor in sorted(kernel.run(make(case)).items()):
        bits = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        print(case.id, name, hashlib.sha256(bits).hexdigest())
"""


def test_large_numbers_in_uninitialised_memory(kernel):
    """malloc fills what it returns with 0x7f (3.4e38 in float32), 0xff would be NaN, 0x01 is tiny: always the
    same bits."""
    if kernel.device != "cpu":
        pytest.skip("malloc lends memory of the CPU")
    script = PRINT_DIGESTS.format(directory=str(Path(__file__).parent), kernel=kernel.name)
    digests = set()
    for byte in ("0", str(0xFF ^ 0x7F), str(0xFF ^ 0x01)):
        environment = os.environ | {"MALLOC_PERTURB_": byte, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr[-2000:]
        digests.add(run.stdout)
    assert len(digests) == 1 and len(digests.pop().splitlines()) >= 5 * len(CASES)
    count("bitwise", 2 * len(CASES))


def with_guards(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(view, buffer): the tensor's values at the same shape within a buffer that holds NaN everywhere else:
    before and after, in gaps between rows, and beyond the end of every row."""
    *lead, last = tensor.shape
    junk = torch.nan if tensor.is_floating_point() else -(2**31)
    buffer = torch.full(
        [size + 2 for size in lead] + [last + 13], junk, dtype=tensor.dtype, device=tensor.device
    )
    view = buffer[(*(slice(1, size + 1) for size in lead), slice(5, last + 5))]
    view.copy_(tensor)
    return view, buffer


@with_cases
def test_guard_bands_and_gaps_are_neither_read_nor_written(kernel, case):
    problem = make(case).to(kernel.device)
    expiry = kernel.select(problem)
    clean = kernel.run(problem)
    buffers = {}

    def guard(name, tensor):
        view, buffers[name] = with_guards(tensor)
        return view

    guarded = problem.replace(
        **{
            name: guard(name, tensor)
            for name, tensor in vars(problem).items()
            if isinstance(tensor, torch.Tensor)
        }
    )
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    results = kernel.run(guarded)
    for name, tensor in clean.items():
        assert bit_for_bit(results[name], tensor), f"{name} depends on memory outside of its inputs"
        count("bitwise")
    if expiry is not None:
        assert torch.equal(kernel.select(guarded), expiry)
        view, buffer = with_guards(expiry)
        again = buffer.clone()
        results = kernel.forward(guarded, view)
        grads = kernel.backward(guarded, view, with_guards(results["out"])[0], with_guards(results["lse"])[0])
        for name, tensor in (results | grads).items():
            assert bit_for_bit(tensor, clean[name]), f"{name} depends on memory outside of expiry, out or lse"
        assert torch.equal(buffer, again)
    for name, buffer in buffers.items():
        assert bit_for_bit(buffer, before[name]), f"{name} was written to"
        count("bitwise")
