"""What a build says about itself, and what a build without CUDA kernels says to CUDA tensors."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import flash_dmattn
import pytest
import torch
from flash_dmattn import _backends
from torch._subclasses.fake_tensor import FakeTensorMode

from counters import count

SCRIPTS = Path(__file__).parents[2] / "scripts"
HAS_CUDA = "; cuda (" in torch.ops.flash_dmattn.describe_build()


def test_flash_dma_cuda_imports_with_the_cuda_kernels_alone():
    code = "import sys; sys.path[:0] = eval(sys.argv[1]); import flash_dma_cuda"
    paths = [*sys.path, str(Path(__file__).parents[2] / "python")]
    result = subprocess.run([sys.executable, "-c", code, repr(paths)], capture_output=True, text=True)
    assert (result.returncode == 0) == HAS_CUDA, result.stderr
    if not HAS_CUDA:
        assert "ImportError: flash_dma_cuda: this build has no CUDA kernels" in result.stderr


def cuda_tensors(dtype, head_dim=16):
    """Fake ones, where there is no GPU."""
    query, key, value = (torch.empty(1, 8, 4, head_dim, dtype=dtype, device="cuda") for _ in range(3))
    return dict(query=query, key=key, value=value, is_causal=True)


@pytest.mark.skipif(HAS_CUDA, reason="this build has CUDA kernels")
def test_cuda_tensors_on_a_build_without_cuda():
    with FakeTensorMode():
        with pytest.raises(NotImplementedError) as caught:
            flash_dmattn.flash_dmattn_func(**cuda_tensors(torch.bfloat16))
    message = str(caught.value)
    assert message.startswith(
        "flash_dmattn_func: backend 'cuda': this build has no CUDA kernels, ask for 'flex' or 'reference' "
    )
    assert "\n" not in message
    count("refusal")


@pytest.mark.skipif(not HAS_CUDA or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "dtype, head_dim, reason",
    [
        (torch.float32, 16, "takes bfloat16 and float16, got float32"),
        (torch.float64, 16, "takes bfloat16 and float16, got float64"),
        (torch.float16, 264, "takes head dims up to 256, got 264"),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_what_the_cuda_kernels_do_not_take(dtype, head_dim, reason, dense):
    mask = dict(attn_mask=torch.ones(1, 4, 8, 8, dtype=torch.bool, device="cuda")) if dense else {}
    with pytest.raises(NotImplementedError) as caught:
        flash_dmattn.flash_dmattn_func(**cuda_tensors(dtype, head_dim), **mask)
    assert f"backend 'cuda': {reason}, ask for " in str(caught.value)
    assert "'reference'" in str(caught.value)
    count("refusal")


@pytest.mark.parametrize("capability, reason", [((7, 5), "this GPU has 7.5"), ((8, 0), ""), ((9, 0), "")])
def test_gpus_below_compute_capability_8(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    answer = _backends._gpu_why_not(torch.device("cuda:0"))
    assert answer.endswith(reason) and bool(answer) == bool(reason)


def test_explain_has_one_line_per_backend():
    query = torch.zeros(1, 8, 4, 16)
    lines = flash_dmattn.explain(query, query, query).splitlines()
    assert lines.pop(2).startswith("  cpu decode: takes ")  # a kernel that was passed over
    assert [line.split(": ")[0] for line in lines] == ["cuda", "cpu", "flex", "reference"]
    assert lines[1:] == ["cpu: runs", "flex: not asked for", "reference: not asked for"]
    count("property", 4)


@pytest.mark.parametrize(
    "answer, lines",
    [
        ("cpu: runs", ["cuda: runs, kernel cpu"]),
        ("sm90: needs a Hopper\nsm80: runs", ["cuda: runs, kernel sm80", "  sm90: needs a Hopper"]),
        ("sm80: takes head dims: few", ["cuda: no kernel takes this call", "  sm80: takes head dims: few"]),
    ],
)
def test_explain_lists_the_kernels_that_were_passed_over(answer, lines):
    assert _backends._explain_kernels("cuda", answer) == lines


CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN12flash_dmattn4cuda14forward_kernelILi64EEEvNS0_10PlanParamsE:
  REG:236 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN12flash_dmattn4cuda5placeEPi:
  REG:31 STACK:48 SHARED:16456 LOCAL:8 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_kernel_resources(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPTS / "kernel_resources.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.parse(CUOBJDUMP) == [
        script.Kernel("sm_80", "forward_kernel<64>", 236, 0, 0, 0),
        script.Kernel("sm_80", "place", 31, 48, 8, 16456),
    ]
    monkeypatch.setattr(script, "resource_usage", lambda library: CUOBJDUMP)
    for limit, code in (("55", 1), ("56", 0)):
        monkeypatch.setattr(sys, "argv", ["kernel_resources.py", "library.so", "--max-stack", limit])
        assert script.main() == code
    assert "place, sm_80: more than 55 bytes" in capsys.readouterr().out
    count("property", 4)
