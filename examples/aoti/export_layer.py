"""Packages a layer for programs without Python: layer.pt2, and cases.pt to check it with.

python examples/aoti/export_layer.py --out DIR; docs/export.md has what comes next. cases.pt holds pairs of
inputs and output, computed here by the layer itself at sizes other than the one it was exported with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from flash_dmattn import get_available_backends
from flash_dmattn.nn import DynamicMaskAttention

HIDDEN_SIZE, HEADS, HEADS_KV, KEEP_WINDOW = 64, 4, 2, 32
HEAD_DIM = HIDDEN_SIZE // HEADS
SIZES = ((1, 100), (3, 257), (2, 20))  # batch and sequence length of the cases


def make_layer(device: str) -> DynamicMaskAttention:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = DynamicMaskAttention(
        HIDDEN_SIZE, HEADS, HEADS_KV, keep_window_size=KEEP_WINDOW, num_sinks=2, device=device, dtype=dtype
    )
    torch.nn.init.normal_(layer.A)  # a new layer has A = 0, a sliding window; training moves it
    return layer.eval()


def make_inputs(layer: DynamicMaskAttention, batch: int, seqlen: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """hidden_states and the rotary (cos, sin)."""
    frequency = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = (torch.arange(seqlen)[:, None] * frequency).repeat(1, 2)
    tensors = (torch.randn(batch, seqlen, HIDDEN_SIZE), angle.cos(), angle.sin())
    hidden_states, cos, sin = (tensor.to(layer.A) for tensor in tensors)
    return hidden_states, (cos, sin)


def package(layer: DynamicMaskAttention, path: Path) -> None:
    batch, seqlen = Dim("batch"), Dim("seqlen")
    dynamic_shapes = ({0: batch, 1: seqlen}, ({0: seqlen}, {0: seqlen}))
    with torch.no_grad():
        program = torch.export.export(layer, make_inputs(layer, 2, 64), dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@torch.no_grad()
def save_cases(layer: DynamicMaskAttention, path: Path) -> None:
    cases = []
    for batch, seqlen in SIZES:
        hidden_states, (cos, sin) = make_inputs(layer, batch, seqlen)
        out = layer(hidden_states, (cos, sin))
        cases.append(([hidden_states.cpu(), cos.cpu(), sin.cpu()], out.cpu()))
    torch.save(cases, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for layer.pt2 and cases.pt")
    default = "cuda" if "cuda" in get_available_backends() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layer = make_layer(arguments.device)
    package(layer, arguments.out / "layer.pt2")
    save_cases(layer, arguments.out / "cases.pt")


if __name__ == "__main__":
    main()
