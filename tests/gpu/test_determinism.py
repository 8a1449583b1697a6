"""A thousand runs give the same bits, whatever memory they get and whatever else the GPU does."""

import contextlib

import pytest
import torch

from cases import Case, make
from counters import count
from judge import reproduction

SHAPES = [
    Case(1, 4096, 4096, 8, 2, 128, "bf16", keep_window=512, bias="separate", dlse=True),
    Case(2, 3000, 5000, 5, 5, 64, "f16", keep_window=100, score="quantised"),
    Case(1, 2500, 2500, 4, 1, 256, "bf16", keep_window=4000, dlse=True),
    Case(
        heads_q=6,
        heads_kv=2,
        head_dim=96,
        dtype="bf16",
        keep_window=64,
        lengths=((700, 700), (0, 5), (1, 3000), (2100, 2100)),
    ),
]
SMALL = 20  # of the lengths, where there is no GPU
BALLAST_BYTES = 64 << 20


def bits(results):
    kinds = {2: torch.int16, 4: torch.int32}
    return {name: tensor.view(kinds[tensor.element_size()]) for name, tensor in results.items()}


def ballast(index, device):
    """Dirty memory: blocks of sizes that change from run to run, so that results and workspaces move."""
    sizes = [BALLAST_BYTES >> ((index + i) % 7 + 2) for i in range(4 + index % 5)]
    return [torch.full((size // 4 + index,), torch.nan, device=device) for size in sizes]


@contextlib.contextmanager
def beside_other_work(streams, index):
    """On another stream than the last run, while the default stream multiplies matrices."""
    if streams is None:
        yield
        return
    torch.cuda.synchronize()
    busy = torch.ones(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        busy @ busy
    with torch.cuda.stream(streams[index % len(streams)]):
        yield
    torch.cuda.synchronize()


def shrunk(case, by):
    lengths = case.lengths and tuple((q // by, max(q // by, k // by)) for q, k in case.lengths)
    sizes = {"seqlen_q": case.seqlen_q // by, "seqlen_k": case.seqlen_k // by}
    return Case(**(vars(case) | sizes | {"lengths": lengths}))


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_a_thousand_runs_give_the_same_bits(kernel, case, pytestconfig):
    on_gpu = kernel.device == "cuda"
    problem = make(case if on_gpu else shrunk(case, SMALL)).to(kernel.device)
    streams = [torch.cuda.Stream() for _ in range(2)] if on_gpu else None
    first = bits(kernel.run(problem))
    expiry = kernel.select(problem)
    differing = dict.fromkeys(first, 0)
    for index in range(pytestconfig.getoption("--repeats")):
        held = ballast(index, kernel.device) if index % 3 == 1 else []
        with beside_other_work(streams, index) if index % 3 == 2 else contextlib.nullcontext():
            again = bits(kernel.run(problem))
        del held
        assert index % 10 or torch.equal(kernel.select(problem), expiry), (
            f"run {index}: the selection differs"
        )
        for name, tensor in again.items():
            differing[name] += not torch.equal(tensor, first[name])
        count("bitwise", len(again))
    wrong = {name: number for name, number in differing.items() if number}
    assert not wrong, f"runs with other bits: {wrong}\n  reproduce: {reproduction(kernel, case)}"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ten_thousand_forwards_give_the_same_bits(kernel, head_dim, pytestconfig):
    case = Case(1, 6000, 6000, 8, 2, head_dim, "bf16", keep_window=1024)
    on_gpu = kernel.device == "cuda"
    problem = make(case if on_gpu else shrunk(case, SMALL)).to(kernel.device)
    expiry = kernel.select(problem)
    first = bits(kernel.forward(problem, expiry))
    differing = torch.zeros((), dtype=torch.int64, device=kernel.device)
    repeats = 10 * pytestconfig.getoption("--repeats")
    for _ in range(repeats):
        for name, tensor in bits(kernel.forward(problem, expiry)).items():
            differing += (tensor != first[name]).any()
    count("bitwise", repeats * len(first))
    assert differing.item() == 0, f"reproduce: {reproduction(kernel, case)}"


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_nearly_full_memory_changes_nothing(kernel, case):
    """The allocator has to give back and cut up what it holds."""
    if kernel.device != "cuda":
        pytest.skip("the memory of a GPU")
    problem = make(case).to("cuda")
    first = bits(kernel.run(problem))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kernel.run(problem)
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1.5 * needed + (256 << 20)) / total)
    try:
        for index in range(20):
            held = torch.full((1 << (10 + index % 8),), torch.nan, device="cuda")
            again = bits(kernel.run(problem))
            del held
            assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
            count("bitwise", len(again))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("pattern", [torch.nan, torch.inf, 1e30, -1e-30])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_what_memory_held_before_changes_nothing(kernel, case, pattern):
    """Results, plans and workspaces come from blocks that held other numbers: large ones and small ones,
    which the allocator keeps apart."""
    if kernel.device != "cuda":
        pytest.skip("the memory of a GPU")
    problem = make(case).to("cuda")
    first = bits(kernel.run(problem))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    dirty = [torch.full((size // 4,), pattern, device="cuda") for size in [1 << 29] + [1 << 19] * 128]
    del dirty
    held = torch.cuda.memory_reserved()
    assert held - before >= 1 << 29
    again = bits(kernel.run(problem))
    assert torch.cuda.memory_reserved() == held, "memory came from elsewhere"
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
    count("bitwise", len(again))
