"""The operators as citizens of PyTorch on CUDA: streams, devices, graphs, compile, memory; P7, P9, P11."""

import threading

import pytest
import torch

import flash_dmattn
from cases import Case, make
from counters import count
from judge import check
from kernels import bit_for_bit

CASES = [
    Case(2, 300, 500, 6, 2, 64, "bf16", keep_window=64, dlse=True),
    Case(1, 2500, 2500, 4, 1, 128, "f16", keep_window=200, bias="separate"),
    Case(
        heads_q=4,
        heads_kv=2,
        head_dim=80,
        dtype="bf16",
        keep_window=32,
        lengths=((70, 90), (0, 4), (200, 200)),
    ),
]
with_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
LONG_SLEEP = 400_000_000  # cycles: 0.2 s and more


@pytest.fixture(autouse=True)
def _on_a_gpu(kernel):
    if kernel.device != "cuda":
        pytest.skip("PyTorch's CUDA")


def same(results, wanted):
    for name, tensor in wanted.items():
        assert bit_for_bit(results[name], tensor), name
        count("bitwise")


def tensors(problem):
    return {name: x for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}


@with_cases
def test_the_public_function(kernel, case):
    check("public-cuda", case)
    no_window = Case(**(vars(case) | {"keep_window": None, "bias": "separate"}))
    check("public-cuda", no_window)


@with_cases
def test_the_current_stream_is_used(kernel, case):
    """The inputs are written late, on the stream that is current at the call."""
    late = make(case).to("cuda")
    wanted = kernel.run(late)
    early = late.map(torch.clone)
    for name in ("query", "key", "value", "dout"):
        getattr(early, name).fill_(0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP)
        for name, tensor in tensors(early).items():
            tensor.copy_(getattr(late, name))
        results = kernel.run(early)
    stream.synchronize()
    same(results, wanted)


@with_cases
def test_the_host_waits_for_nothing(kernel, case):
    problem = make(case).to("cuda")
    kernel.run(problem)
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(LONG_SLEEP)
    asleep.record()
    kernel.run(problem)
    assert not asleep.query(), "the call returned only after the work before it was done"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        public(problem, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    count("property", 2)


def public(problem, case, leaves=None):
    """The public function with gradients of query, key, value and bias."""
    names = ("query", "key", "value", "bias")
    leaves = leaves or {name: getattr(problem, name).detach().clone().requires_grad_() for name in names}
    packed = {}
    function = flash_dmattn.flash_dmattn_func
    if case.lengths is not None:
        function = flash_dmattn.flash_dmattn_varlen_func
        packed = dict(cu_seqlens_q=problem.cu_seqlens_q, cu_seqlens_k=problem.cu_seqlens_k)
    out = function(
        *(leaves[name] for name in names[:3]),
        attn_bias=leaves["bias"],
        attn_score=problem.score,
        is_causal=True,
        keep_window_size=case.keep_window,
        **packed,
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), problem.dout)
    return dict(zip(("out", "dq", "dk", "dv", "dbias"), (out.detach(), *gradients)))


@with_cases
def test_graph_capture(kernel, case):
    """Selection, plan, forward and backward, recorded once and replayed with other inputs."""
    problem = make(case).to("cuda")
    other = make(Case(**(vars(case) | {"seed": 7}))).to("cuda")
    wanted = kernel.run(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel.run(problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.run(problem)
    for name, tensor in tensors(problem).items():
        tensor.copy_(getattr(other, name))
    for tensor in captured.values():
        tensor.fill_(torch.nan)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    same(captured, wanted)


@with_cases
def test_another_device_may_be_current(kernel, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    problem = make(case)
    wanted = kernel.run(problem.to("cuda:0"))
    with torch.cuda.device(0):
        results = kernel.run(problem.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in results.values())
    same(results, wanted)


@with_cases
def test_memory_is_of_torchs_allocator_and_given_back(kernel, case):
    problem = make(case).to("cuda")
    kernel.run(problem)
    torch.cuda.synchronize()
    used, segments = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(20):
        results = kernel.run(problem)
    torch.cuda.synchronize()
    sizes = sum(-(-x.numel() * x.element_size() // 512) * 512 for x in results.values())
    assert torch.cuda.memory_allocated() <= used + sizes
    del results
    assert torch.cuda.memory_allocated() == used
    assert torch.cuda.memory_stats()["num_device_alloc"] <= segments + 2, "memory is not used again"
    count("property", 3)


@with_cases
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(kernel, case, backend):
    problem = make(case).to("cuda")
    torch._dynamo.reset()
    wanted = public(problem, case)

    def attend(query, key, value, bias, score):
        packed = {}
        function = flash_dmattn.flash_dmattn_func
        if case.lengths is not None:
            function = flash_dmattn.flash_dmattn_varlen_func
            packed = dict(cu_seqlens_q=problem.cu_seqlens_q, cu_seqlens_k=problem.cu_seqlens_k)
        window = case.keep_window
        return function(
            query,
            key,
            value,
            attn_bias=bias,
            attn_score=score,
            is_causal=True,
            keep_window_size=window,
            **packed,
        )

    names = ("query", "key", "value", "bias")
    leaves = [getattr(problem, name).detach().clone().requires_grad_() for name in names]
    out = torch.compile(attend, fullgraph=True, backend=backend)(*leaves, problem.score)
    gradients = torch.autograd.grad(out, leaves, problem.dout)
    same(dict(zip(wanted, (out.detach(), *gradients))), wanted)


@with_cases
def test_opcheck(kernel, case):
    problem = make(case).to("cuda")
    ops, window = kernel.ops, case.keep_window
    cu = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    score, rows = problem.score, problem.query.shape[-3]
    expiry = kernel.select(problem)
    plan_arguments = (expiry, score, problem.bias, *cu, rows, window, True)
    plan = ops.plan(*plan_arguments)
    inputs = (problem.query, problem.key, problem.value, problem.bias, None, expiry, score, plan)
    options = (*cu, window, problem.scale, True)
    out, lse = ops.forward(*inputs, *options)
    gradients = (problem.dout, problem.dlse)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.select.default, (score, window, True, 0, 0, cu[1], -1), test_utils=tests)
    torch.library.opcheck(ops.plan.default, plan_arguments, test_utils=tests)
    torch.library.opcheck(ops.forward.default, (*inputs, *options), test_utils=tests)
    needs = (True, True, True, True)
    torch.library.opcheck(
        ops.backward.default, (*gradients, *inputs, out, lse, *options, *needs), test_utils=tests
    )
    count("property", 4)


@with_cases
def test_a_given_plan_is_the_one_that_is_made_within(kernel, case):
    problem = make(case).to("cuda")
    wanted = kernel.run(problem)
    expiry, window = kernel.select(problem), case.keep_window
    cu, rows = (problem.cu_seqlens_q, problem.cu_seqlens_k), problem.query.shape[-3]
    score = problem.ranked_score()
    plan = kernel.ops.plan(expiry, score, problem.bias, *cu, rows, window, True)
    inputs = (problem.query, problem.key, problem.value, problem.bias, None, expiry, score, plan)
    options = (*cu, window, problem.scale, True)
    out, lse = kernel.ops.forward(*inputs, *options)
    needs = (True, True, True, True)
    gradients = kernel.ops.backward(problem.dout, problem.dlse, *inputs, out, lse, *options, *needs)
    same(dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *gradients))), wanted)


def test_wrong_values_on_the_device_do_no_harm(kernel):
    """expiry and cu_seqlens cannot be checked on the way; they lead nowhere out of bounds and end."""
    case = CASES[2]
    problem = make(case).to("cuda")
    wanted = kernel.run(problem)
    total = problem.query.shape[0]
    generator = torch.Generator("cuda").manual_seed(3)
    for bounds in ([0, 10**9, -5, total], [-7, 50, 20, 10**9], [2**31 - 1] * 4, [-(2**31)] * 4):
        bad = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        kernel.run(problem.replace(cu_seqlens_q=bad, cu_seqlens_k=bad))
        shape = problem.score.shape
        expiry = torch.randint(
            -(2**31), 2**31 - 1, shape, generator=generator, device="cuda", dtype=torch.int32
        )
        kernel.run(problem.replace(score=None, fixed_expiry=expiry))
        torch.cuda.synchronize()
        count("property", 2)
    same(kernel.run(problem), wanted)


def test_threads_with_a_stream_each(kernel):
    problems = [make(case).to("cuda") for case in CASES]
    wanted = [kernel.run(problem) for problem in problems]
    torch.cuda.synchronize()
    wrong = []

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for round_ in range(20):
                at = (number + round_) % len(CASES)
                results = kernel.run(problems[at])
                torch.cuda.current_stream().synchronize()
                wrong.extend(name for name, x in results.items() if not bit_for_bit(x, wanted[at][name]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    count("bitwise", 6 * 20 * 6)
