"""python -m flash_dmattn info | check | bench"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import __version__, _backends, _ops, _selfcheck, explain, flash_dmattn_func


def info() -> int:
    """Versions, build, devices, backends, kernels."""
    print(f"flash_dmattn {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    load_error = _backends.load_error
    print(f"native library: {load_error or _ops.native.describe_build()}")
    print(f"devices: {', '.join(_devices())}")
    print("backends:")
    for backend in _backends.BACKENDS:
        print(f"  {backend.name}: {backend.unavailable() or 'available'}")
    device = "cuda" if "cuda" in _backends.available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = torch.zeros(1, 128, 8, 64, dtype=dtype, device=device)
    key = torch.zeros(1, 128, 2, 64, dtype=dtype, device=device)
    score = torch.zeros(1, 2, 128, device=device)
    print(f"a causal call with a window on {device}, {str(dtype).removeprefix('torch.')}, head dim 64:")
    for line in explain(query, key, key, attn_bias=score, keep_window_size=32, is_causal=True).splitlines():
        print(f"  {line}")
    return 0


def _devices() -> list[str]:
    processor = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return [processor] + [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())
    ]


def bench(arguments: argparse.Namespace) -> int:
    """Times our attention beside PyTorch's dense causal attention at one shape."""
    batch, seqlen, heads, heads_kv, head_dim = arguments.shape
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(arguments.backward)

    query = normal(batch, seqlen, heads, head_dim)
    key, value = normal(batch, seqlen, heads_kv, head_dim), normal(batch, seqlen, heads_kv, head_dim)
    score = (
        torch.randn(batch, heads_kv, seqlen, generator=generator)
        .to(device)
        .requires_grad_(arguments.backward)
    )

    def ours() -> Tensor:
        return flash_dmattn_func(
            query, key, value, attn_bias=score, keep_window_size=arguments.window, is_causal=True
        )

    def dense() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != heads_kv
        )
        return out.transpose(1, 2)

    # Where nothing is dropped and nothing added, the two are the same function.
    with torch.no_grad():
        difference = (flash_dmattn_func(query, key, value, is_causal=True) - dense()).abs().max().item()
    limit = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    print(
        f"without a window, largest difference from PyTorch's attention: {difference:.1e} (limit {limit:.0e})"
    )
    if not difference <= limit:
        print("FAILED: not timed")
        return 1
    passes = "forward and backward" if arguments.backward else "forward"
    shape = f"B {batch}, S {seqlen}, H {heads}, Hkv {heads_kv}, D {head_dim}, {arguments.dtype}, {device}"
    print(f"{passes}, {shape}, medians of {arguments.repeats}")
    times = {}
    for name, run in ((f"flash_dmattn, window {arguments.window}", ours), ("dense, PyTorch", dense)):
        times[name] = _time(run, arguments.backward, arguments.repeats, device)
        print(f"  {name:32}{times[name] * 1e3:10.2f} ms")
    sparse_time, dense_time = times.values()
    print(f"  {dense_time / sparse_time:.2f} times as fast")
    return 0


def _time(run: Callable[[], Tensor], backward: bool, repeats: int, device: str) -> float:
    def synchronize() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        out = run()
        if backward:
            out.sum().backward()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flash_dmattn", description="Dynamic-mask sparse attention."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build, devices, backends, kernels")
    commands.add_parser("check", help="compare every backend on this machine with the reference, in seconds")
    timing = commands.add_parser(
        "bench",
        help="time our attention beside PyTorch's at one shape",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    timing.add_argument(
        "--shape",
        type=int,
        nargs=5,
        metavar=("B", "S", "H", "HKV", "D"),
        default=[1, 4096, 8, 2, 64],
        help="sizes",
    )
    timing.add_argument("--window", type=int, default=512, help="keep_window_size")
    timing.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), default="float32")
    timing.add_argument("--device", default="cpu")
    timing.add_argument("--backward", action="store_true", help="time forward and backward")
    timing.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "info":
        return info()
    if arguments.command == "check":
        return 0 if _selfcheck.check() else 1
    return bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
