"""P11: fake kernels agree with the real ones, and torch.compile(fullgraph=True) takes the calls, forward and
backward."""

import flash_dmattn
import pytest
import torch
from flash_dmattn import flash_dmattn_func, flash_dmattn_varlen_func
from flash_dmattn.nn import DynamicMaskAttention
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cases import Case, make
from counters import count
from kernels import bit_for_bit

CASES = [
    Case(
        batch=2,
        seqlen_q=20,
        seqlen_k=33,
        head_dim=16,
        keep_window=8,
        dtype=dtype,
        dlse=True,
        bias=bias,
        causal=causal,
    )
    for dtype, bias, causal in (
        ("f32", "score", True),
        ("bf16", "separate", False),
        ("f64", "none", True),
        ("f16", "score", True),
    )
] + [
    Case(seqlen_q=20, seqlen_k=20, head_dim=16, keep_window=None, bias="none"),
    Case(seqlen_q=20, seqlen_k=33, head_dim=16, keep_window=8, mask="B Hkv Sq Sk", dtype="bf16"),
    Case(seqlen_q=20, seqlen_k=33, head_dim=16, keep_window=None, mask="1 1 Sq Sk", dense_bias="B H Sq Sk"),
    Case(seqlen_q=20, seqlen_k=33, head_dim=16, keep_window=None, dense_bias="1 1 1 Sk", dense_dtype="bf16"),
    Case(lengths=((5, 9), (0, 3), (12, 12)), head_dim=16, keep_window=4, dlse=True),
]
with_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@with_cases
def test_opcheck(kernel, case):
    """All of opcheck's utilities on every operator; the derivative with and without each input's
    requires_grad."""
    problem = make(case).to(kernel.device)
    expiry = kernel.select(problem)
    if problem.score is not None:
        opcheck(
            kernel.ops.select.default,
            (problem.score, problem.keep_window, case.causal, 1, 0, problem.cu_seqlens_k, -1),
        )
    selection = kernel.selection(problem, expiry)
    rest = (
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        kernel.keep_window(problem, expiry),
        problem.scale,
        case.causal,
    )
    for needs in ((True, True, True, True), (False, True, False, True), (False,) * 4):
        leaves = [
            None if tensor is None else tensor.detach().clone().requires_grad_(need)
            for tensor, need in zip((problem.query, problem.key, problem.value, problem.bias), needs)
        ]
        opcheck(kernel.ops.forward.default, (*leaves, *selection, *rest))
        count("property")
    result = kernel.forward(problem, expiry)
    opcheck(
        kernel.ops.backward.default,
        (
            problem.dout,
            problem.dlse,
            problem.query,
            problem.key,
            problem.value,
            problem.bias,
            *selection,
            result["out"],
            result["lse"],
            *rest,
            True,
            False,
            True,
            problem.bias is not None,
        ),
    )
    count("property", 2)


@with_cases
def test_fake_kernels_agree(kernel, case):
    problem = make(case).to(kernel.device)
    expiry = kernel.select(problem)
    real = kernel.run(problem)
    with FakeTensorMode() as mode:
        fake = problem.map(mode.from_tensor)
        fake_expiry = kernel.select(fake)
        results = kernel.run(fake)
    assert (fake_expiry is None) == (expiry is None)
    pairs = [(results[name], real[name]) for name in real] + (
        [] if expiry is None else [(fake_expiry, expiry)]
    )
    for first, second in pairs:
        assert (first.shape, first.dtype, first.stride(), first.device) == (
            second.shape,
            second.dtype,
            second.stride(),
            second.device,
        )
        count("property")


def attend(query, key, value, bias):
    out, lse = flash_dmattn_func(
        query, key, value, attn_bias=bias, keep_window_size=8, is_causal=True, return_lse=True
    )
    return 2 * out, lse


def attend_with_everything(query, key, value, bias):
    expiry = flash_dmattn.select_keys(bias, 8, num_sinks=2, local_window=3)
    mask = torch.ones(query.shape[0], key.shape[1], dtype=torch.bool, device=query.device)
    mask[:, :2] = False
    out = flash_dmattn_func(
        query, key, value, attn_bias=bias, attn_mask=mask, expiry=expiry, is_causal=True, scale=0.3
    )
    return out, out.float().mean()


def attend_densely(query, key, value, bias):
    """A mask that depends on the rows, and a bias whose gradient is a sum over the batch."""
    expiry = flash_dmattn.select_keys(bias, 8)
    mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(-3)
    dense_bias = (query.mean((0, 2, 3))[:, None] * bias.mean((0, 1))).to(bias.dtype)
    return flash_dmattn_func(
        query, key, value, attn_bias=dense_bias[None, None], attn_mask=mask[None, None], expiry=expiry,
        is_causal=True, return_lse=True,
    )  # fmt: skip


FUNCTIONS = [attend, attend_with_everything, attend_densely]


def compare_compiled(function, compiled, arguments):
    results = []
    for call in (function, compiled):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
        outputs = call(*leaves)
        sum(output.float().square().sum() for output in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        count("property")


def arguments_of(kernel, batch, seqlen_q, seqlen_k, heads_q=4, dtype="f32"):
    problem = make(
        Case(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=heads_q, head_dim=16, dtype=dtype)
    )
    problem = problem.to(kernel.device)
    return problem.query, problem.key, problem.value, problem.bias


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_with_static_shapes(kernel, function, backend):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    compare_compiled(function, compiled, arguments_of(kernel, 2, 20, 33))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_with_dynamic_shapes(kernel, function, backend):
    """One compilation serves all sizes; inductor may add one, for loops that grow long enough for threads."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for sizes in (
        (3, 20, 33),
        (5, 41, 64),
        (7, 9, 19),
    ):  # no two alike, or the compiler takes them for one size
        compare_compiled(function, compiled, arguments_of(kernel, *sizes))
    assert counter.frame_count <= (1 if backend == "aot_eager" else 2)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_packed_sequences(kernel, dynamic):
    torch._dynamo.reset()
    problem = make(CASES[-1]).to(kernel.device)

    def function(query, key, value, bias):
        return flash_dmattn_varlen_func(
            query,
            key,
            value,
            attn_bias=bias,
            keep_window_size=4,
            is_causal=True,
            cu_seqlens_q=problem.cu_seqlens_q,
            cu_seqlens_k=problem.cu_seqlens_k,
            return_lse=True,
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = (problem.query, problem.key, problem.value, problem.bias)
    for call in (function, compiled):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
        out, lse = call(*leaves)
        out.sum().backward()
    for first, second in zip(function(*arguments), compiled(*arguments)):
        assert bit_for_bit(first, second)
        count("bitwise")


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_autocast(kernel, dynamic):
    torch._dynamo.reset()

    def function(query, key, value, bias):
        with torch.autocast(query.device.type, dtype=torch.bfloat16):
            return attend(query, key, value, bias)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = arguments_of(kernel, 2, 20, 33)
    assert compiled(*arguments)[0].dtype == torch.bfloat16
    compare_compiled(function, compiled, arguments)


@pytest.mark.parametrize("score_function, dynamic", [("exp", True), ("linear", False)])
def test_compiled_layer(kernel, score_function, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DynamicMaskAttention(
        32, 4, num_kv_heads=2, keep_window_size=8, score_function=score_function, num_sinks=1
    )
    layer = layer.to(kernel.device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (20, 33) if dynamic else (20,):
        hidden = torch.randn(2, length, 32, device=kernel.device)
        mask = torch.rand(2, length, device=kernel.device) < 0.8
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            out = call(hidden, attn_mask=mask)
            out.square().sum().backward()
            results.append([out, *(parameter.grad.clone() for parameter in layer.parameters())])
        for first, second in zip(*results):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
            count("property")


def test_export(kernel):
    """The operators survive torch.export as themselves."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, bias):
            return flash_dmattn_func(query, key, value, attn_bias=bias, keep_window_size=8, is_causal=True)

    arguments = arguments_of(kernel, 2, 20, 33)
    program = torch.export.export(Attention(), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "flash_dmattn.select.default" in targets and "flash_dmattn.forward.default" in targets
    assert bit_for_bit(program.module()(*arguments), Attention()(*arguments))
    count("bitwise")
