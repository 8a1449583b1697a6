"""P9: calls from several Python threads at once, and from DataLoader workers forked off a process that has
used threads."""

import threading

import flash_dmattn
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cases import Case, make
from counters import count
from emulated import EmulatedKernel
from judge import KERNELS
from kernels import bit_for_bit
from narrowing import fit

CASES = [
    Case(batch=2, seqlen_q=200, seqlen_k=200, keep_window=32, dlse=True, seed=1),
    Case(batch=1, seqlen_q=300, seqlen_k=400, keep_window=64, dtype="bf16", heads_q=6, heads_kv=2, seed=2),
    Case(lengths=((40, 70), (90, 90)), keep_window=16, dtype="f64", seed=3),
    Case(batch=1, seqlen_q=150, seqlen_k=150, keep_window=None, bias="separate", dtype="f16", seed=4),
]


def assert_same(results, wanted):
    for name, tensor in wanted.items():
        assert bit_for_bit(results[name], tensor), name
        count("bitwise")


def test_concurrent_calls(kernel):
    problems = [make(fit(case, kernel)).to(kernel.device) for case in CASES]
    wanted = [kernel.run(problem) for problem in problems]
    results, errors = {}, []
    emulated = isinstance(kernel, EmulatedKernel)
    barrier = threading.Barrier(len(problems))

    def work(index):
        try:
            barrier.wait()
            results[index] = [kernel.run(problems[index]) for _ in range(2 if emulated else 10)]
        except Exception as error:  # noqa: BLE001 (reported below, from the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not errors, errors
    for index, repeated in results.items():
        for result in repeated:
            assert_same(result, wanted[index])


def test_concurrent_errors_do_not_mix(kernel):
    """Each thread gets the message of its own call."""
    messages = {}

    def work(window):
        for _ in range(50):
            try:
                kernel.ops.select(torch.zeros(1, 1, 8, device=kernel.device), window, True, 0, 0, None)
            except RuntimeError as error:
                messages.setdefault(window, set()).add(str(error))

    threads = [threading.Thread(target=work, args=(-n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == 4
    for window, seen in messages.items():
        assert len(seen) == 1 and f"got {window}," in seen.pop()


class Attended(Dataset):
    """Forward and backward within a worker process."""

    def __init__(self, kernel_name):
        self.kernel_name = kernel_name

    def __len__(self):
        return 8

    def __getitem__(self, index):
        kernel = KERNELS[self.kernel_name]
        return index, kernel.run(make(fit(CASES[index % len(CASES)], kernel)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(kernel, method):
    if kernel.device != "cpu":
        pytest.skip("CUDA does not survive a fork")
    torch.set_num_threads(2)
    wanted = [kernel.run(make(fit(case, kernel))) for case in CASES]  # the pool of this process has threads now
    loader = DataLoader(
        Attended(kernel.name), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
    )
    indices = []
    for index, results in loader:
        assert_same(results, wanted[index % len(CASES)])
        indices.append(index)
    assert sorted(indices) == list(range(8))
    assert_same(kernel.run(make(fit(CASES[0], kernel))), wanted[0])


def test_backward_on_another_thread_than_forward(kernel):
    problem = make(fit(CASES[0], kernel)).to(kernel.device)
    wanted = kernel.run(problem)
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (problem.query, problem.key, problem.value, problem.bias)
    ]
    out, lse = flash_dmattn.flash_dmattn_func(
        *leaves[:3], attn_bias=leaves[3], keep_window_size=32, is_causal=True, return_lse=True
    )
    thread = threading.Thread(
        target=lambda: torch.autograd.backward([out, lse], [problem.dout, problem.dlse])
    )
    thread.start()
    thread.join()
    assert_same(
        dict(zip(("dq", "dk", "dv", "dbias"), (leaf.grad for leaf in leaves))),
        {name: wanted[name] for name in ("dq", "dk", "dv", "dbias")},
    )
