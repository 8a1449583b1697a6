"""torch.export of calls and of the layer, with dynamic sizes; and a packaged layer in a C++ program without
Python (examples/aoti)."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_dmattn import flash_dmattn_func
from flash_dmattn.nn import DynamicMaskAttention
from torch.export import Dim

from counters import count
from kernels import bit_for_bit

EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti"
SELECT, FORWARD = "flash_dmattn.select.default", "flash_dmattn.forward.default"
HIDDEN_SIZE, HEAD_DIM = 32, 8
either_mode = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


def make_layer(kernel, **options):
    layer = DynamicMaskAttention(
        HIDDEN_SIZE, 4, 2, keep_window_size=8, num_sinks=1, device=kernel.device, **options
    )
    torch.nn.init.normal_(layer.A)
    return layer.to(torch.bfloat16) if kernel.device == "cuda" else layer


def like(parameter, *shape):
    return torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)


def operators(program):
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("flash_dmattn.")]


def export_and_compare(module, examples, dynamic_shapes, strict, expected=(SELECT, FORWARD)):
    """Exports with the first of the examples. For all of them the program gives the module's bits."""
    program = torch.export.export(module, examples[0], dynamic_shapes=dynamic_shapes, strict=strict)
    assert operators(program) == [*expected]
    exported = program.module()
    for arguments in examples:
        assert bit_for_bit(exported(*arguments), module(*arguments))
        count("bitwise")
    return program


@either_mode
def test_layer(kernel, strict):
    layer = make_layer(kernel, qk_norm=True)

    def arguments(batch, seqlen):
        angles = like(layer.A, seqlen, HEAD_DIM), like(layer.A, seqlen, HEAD_DIM)
        mask = torch.rand(batch, seqlen, device=kernel.device) < 0.8
        return like(layer.A, batch, seqlen, HIDDEN_SIZE), angles, mask

    batch, seqlen = Dim("batch"), Dim("seqlen")
    dynamic_shapes = (
        {0: batch, 1: seqlen},
        ({0: seqlen}, {0: seqlen}),
        {0: batch, 1: seqlen},
    )
    examples = [arguments(*sizes) for sizes in ((2, 20), (3, 33), (1, 7), (1, 1), (5, 300), (0, 20))]
    export_and_compare(layer, examples, dynamic_shapes, strict)


@either_mode
def test_layer_on_packed_sequences(kernel, strict):
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_layer(kernel)

        def forward(self, hidden_states, cu_seqlens):
            return self.layer(hidden_states, cu_seqlens=cu_seqlens)

    packed = Packed()

    def arguments(*lengths):
        cu_seqlens = torch.tensor([0, *lengths], device=kernel.device).cumsum(0).to(torch.int32)
        return like(packed.layer.A, sum(lengths), HIDDEN_SIZE), cu_seqlens

    examples = [arguments(5, 9, 20), arguments(3, 0, 2, 40), arguments(7)]
    export_and_compare(packed, examples, ({0: Dim("tokens")}, {0: Dim("offsets")}), strict)


@either_mode
def test_keep_window(kernel, strict):
    """Here the number of queries, a size, is an argument of an operator."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, score):
            return flash_dmattn_func(
                query, key, value, attn_bias=score, keep_window_size=8, is_causal=True, return_lse=True
            )[0]

    parameter = make_layer(kernel).A

    def arguments(batch, seqlen_q, seqlen_k):
        query = like(parameter, batch, seqlen_q, 4, HEAD_DIM)
        key, value = (like(parameter, batch, seqlen_k, 2, HEAD_DIM) for _ in range(2))
        return query, key, value, like(parameter, batch, 2, seqlen_k).float()

    batch, seqlen_q, seqlen_k = Dim("batch"), Dim("seqlen_q"), Dim("seqlen_k")
    dynamic_shapes = (
        {0: batch, 1: seqlen_q},
        {0: batch, 1: seqlen_k},
        {0: batch, 1: seqlen_k},
        {0: batch, 2: seqlen_k},
    )
    examples = [arguments(*sizes) for sizes in ((2, 20, 33), (3, 1, 50), (1, 9, 9))]
    export_and_compare(Attention(), examples, dynamic_shapes, strict)


@either_mode
def test_mask_and_bias_per_query(kernel, strict):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, mask, bias):
            return flash_dmattn_func(query, key, value, mask, bias, is_causal=True)

    parameter = make_layer(kernel).A

    def arguments(batch, seqlen):
        query, key, value = (like(parameter, batch, seqlen, heads, HEAD_DIM) for heads in (4, 2, 2))
        mask = torch.rand(batch, 2, seqlen, seqlen, device=kernel.device) < 0.5
        return query, key, value, mask, like(parameter, 1, 4, seqlen, seqlen)

    batch, seqlen = Dim("batch"), Dim("seqlen")
    rows = {0: batch, 1: seqlen}
    dynamic_shapes = (rows, rows, rows, {0: batch, 2: seqlen, 3: seqlen}, {2: seqlen, 3: seqlen})
    examples = [arguments(*sizes) for sizes in ((2, 20), (3, 33), (1, 9))]
    export_and_compare(Attention(), examples, dynamic_shapes, strict, expected=[FORWARD])


def test_gradients_of_an_exported_layer(kernel):
    """The program is differentiable: it calls the operators, which bring their derivatives."""
    layer = make_layer(kernel)
    example = like(layer.A, 2, 20, HIDDEN_SIZE)
    dynamic_shapes = ({0: Dim("batch"), 1: Dim("seqlen")},)
    exported = torch.export.export(layer, (example,), dynamic_shapes=dynamic_shapes).module()
    hidden_states = like(layer.A, 3, 33, HIDDEN_SIZE)
    for module in (exported, layer):
        module(hidden_states).square().sum().backward()
    expected = dict(layer.named_parameters())
    gradients = {name: parameter.grad for name, parameter in exported.named_parameters()}
    assert gradients.keys() == expected.keys() and gradients["A"].abs().min() > 0
    for name, gradient in gradients.items():
        assert bit_for_bit(gradient, expected[name].grad), name
        count("bitwise")


def test_saved_and_loaded(kernel):
    layer = make_layer(kernel)
    arguments = (like(layer.A, 2, 20, HIDDEN_SIZE),)
    program = export_and_compare(layer, [arguments], ({0: Dim("batch"), 1: Dim("seqlen")},), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    longer = (like(layer.A, 1, 45, HIDDEN_SIZE),)
    assert bit_for_bit(loaded(*longer), layer(*longer))
    count("bitwise")


def require_compilers():
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError as error:
        pytest.skip(f"this PyTorch has no inductor ({error})")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor finds no C++ compiler, and packages cannot be compiled")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on the PATH")


def succeed(*command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"


def files_loaded(log):
    """What the dynamic loader opened, from the log of LD_DEBUG=files."""
    lines = log.read_text().splitlines()
    return {Path(line.split("file=")[1].split(" ")[0]).name for line in lines if "file=" in line}


@pytest.mark.slow
def test_packaged_layer_runs_without_python(kernel, tmp_path):
    """The commands of docs/export.md. The program compares the package with what Python saved."""
    require_compilers()
    configure = ("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}")
    succeed(*configure)
    with subprocess.Popen(("cmake", "--build", tmp_path), stdout=subprocess.DEVNULL) as build:
        succeed(sys.executable, EXAMPLE / "export_layer.py", "--out", tmp_path, "--device", kernel.device)
    assert build.returncode == 0

    (library,) = (path for path in torch.ops.loaded_libraries if path.endswith("libflash_dmattn_torch.so"))
    program, package, cases = (tmp_path / name for name in ("run_layer", "layer.pt2", "cases.pt"))
    log = tmp_path / "loader"
    result = subprocess.run(
        (program, library, package, cases),
        env=os.environ | {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(log)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    expected = torch.load(cases)
    assert len(result.stdout.splitlines()) == len(expected) == 3
    for line, (_, out) in zip(result.stdout.splitlines(), expected):
        assert line.startswith(f"{list(out.shape)} on {kernel.device}: largest difference ")
        count("property")

    (log,) = tmp_path.glob("loader.*")
    loaded = files_loaded(log)
    assert {"libtorch_cpu.so", Path(library).name} <= loaded
    assert not any("python" in name for name in loaded), loaded

    # Other values are noticed, and so is a missing operator library.
    expected[-1][1][0, 0, 0] += 0.5
    torch.save(expected, cases)
    result = subprocess.run((program, library, package, cases), capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 3
    result = subprocess.run((program, "libm.so.6", package, cases), capture_output=True, text=True)
    assert result.returncode == 1 and "flash_dmattn::select" in result.stderr
    count("refusal", 2)
