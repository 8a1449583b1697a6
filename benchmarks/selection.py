"""What the selection costs: time by events and of each kernel, host time, workspace.

    python benchmarks/selection.py
    python benchmarks/selection.py --shape "one head" --kernels --out selection.json

One line per shape and kind of scores. A selection is timed only after it was found equal to the CPU's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import environment
from timing import timed

HOST_CALLS = 20  # whose time on the host is measured together, without a synchronisation
CALLS_IN_A_ROW = 50  # the second and later find their scores in L2, where they fit


@dataclass(frozen=True)
class Shape:
    name: str
    seqlen_k: int
    heads: int
    keep_window: int
    limit_us: float | None = None  # what it may take on an H200
    num_queries: int = -1
    is_causal: bool = True
    num_sequences: int = 0  # packed, of about equal length; 0: one sequence, not packed


SHAPES = (
    Shape("short", 32_768, 8, 1024, 60),
    Shape("middle", 131_072, 8, 2048, 200),
    Shape("long", 1_048_576, 8, 4096, 1500),
    Shape("one head", 32_768, 1, 1024, 25),
    Shape("decode", 524_288, 8, 2048, 60, num_queries=1),
    Shape("decode, one head", 524_288, 1, 1024, 25, num_queries=1),
    Shape("few rows", 524_288, 8, 2048, num_queries=16),
    Shape("quarter of rows", 131_072, 8, 2048, num_queries=32_768),
    Shape("one chunk", 1024, 8, 128),
    Shape("8K", 8192, 8, 1024),
    Shape("wide", 1_048_576, 1, 131_072),
    Shape("packed", 131_072, 8, 1024, num_sequences=13),
    Shape("not causal", 131_072, 8, 2048, is_causal=False),
)
SCORES = {
    "iid": lambda n, heads: torch.randn(heads, n, device="cuda"),
    "recency": lambda n, heads: (
        torch.randn(heads, n, device="cuda") + 30 * torch.arange(n, device="cuda") / n
    ),
    "rising": lambda n, heads: torch.arange(n, device="cuda").float().expand(heads, n).contiguous(),
    "equal": lambda n, heads: torch.full((heads, n), 0.5, device="cuda"),
    "bf16": lambda n, heads: torch.randn(heads, n, device="cuda").exp().bfloat16(),
}


def measure(shape: Shape, kind: str, runs: int, kernels: bool) -> dict[str, object]:
    torch.manual_seed(0)
    score, cu_seqlens = SCORES[kind](shape.seqlen_k, shape.heads), None
    if shape.num_sequences:
        score = score.T.contiguous()
        cu_seqlens = torch.linspace(0, shape.seqlen_k, shape.num_sequences + 1, device="cuda").int()
    else:
        score = score[None]

    def select(score: Tensor = score, cu_seqlens: Tensor | None = cu_seqlens) -> Tensor:
        rule = (shape.keep_window, shape.is_causal, 0, 0)
        return torch.ops.flash_dmattn.select(score, *rule, cu_seqlens, shape.num_queries)

    wanted = select(score.cpu(), None if cu_seqlens is None else cu_seqlens.cpu())
    found = select().cpu()
    if not torch.equal(found, wanted):
        wrong = (found != wanted).nonzero()
        at = tuple(wrong[0].tolist())
        raise SystemExit(
            f"wrong: {shape} {kind}: {len(wrong)} of {wanted.numel()} expiries, first {at}: "
            f"{found[at]}, the CPU's {wanted[at]}, score {score[at]}"
        )

    def work(mark) -> None:
        select()
        mark("select")

    def work_in_a_row(mark) -> None:
        for _ in range(CALLS_IN_A_ROW):
            select()
        mark("select")

    entry: dict[str, object] = asdict(shape) | {"scores": kind}
    entry["us"] = [1e6 * timed("cuda", work)["select"] for _ in range(runs + 2)][2:]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        select()
    entry["host_us"] = 1e6 * (time.perf_counter() - start) / HOST_CALLS
    torch.cuda.synchronize()
    entry["in_a_row_us"] = 1e6 * timed("cuda", work_in_a_row)["select"] / CALLS_IN_A_ROW
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = select()
    entry["workspace_bytes"] = torch.cuda.max_memory_allocated() - before - 4 * result.numel()
    if kernels:
        entry["kernel_us"] = kernel_times(select)
    return entry


def kernel_times(select, calls: int = 10) -> dict[str, float]:
    """Mean microseconds of each kernel of a call, in their order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            select()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.split("(")[0].split("::")[-1].removeprefix("void ")
            times[name] += event.device_time / calls
    return dict(times)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11, help="timed repetitions (default: %(default)s)")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shape", action="append", choices=names, help="default: all")
    parser.add_argument("--scores", action="append", choices=list(SCORES), help="default: all")
    parser.add_argument(
        "--kernels", action="store_true", help="the time of each kernel, from PyTorch's profiler"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    columns = "shape               keys heads      w  rows scores  |      us (p10, p90) limit"
    print(f"{columns} | in a row | host us | MB")
    results = []
    for shape in SHAPES:
        for kind in options.scores or SCORES if not options.shape or shape.name in options.shape else ():
            entry = measure(shape, kind, options.runs, options.kernels)
            results.append(entry)
            print_entry(entry)
    if options.out:
        found = {"environment": environment.describe(), "selections": results}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def print_entry(entry: dict) -> None:
    times = sorted(entry["us"])
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    rows = "all" if entry["num_queries"] < 0 else str(entry["num_queries"])
    limit = "" if entry["limit_us"] is None else f"{entry['limit_us']:g}"
    print(
        f"{entry['name']:16} {entry['seqlen_k']:>7} {entry['heads']:>5} {entry['keep_window']:>6} {rows:>5} "
        f"{entry['scores']:7} | {statistics.median(times):7.1f} ({low:.1f}, {high:.1f}) {limit:>5} | "
        f"{entry['in_a_row_us']:8.1f} | {entry['host_us']:7.1f} | {entry['workspace_bytes'] / 1e6:.1f}",
        flush=True,
    )
    for name, microseconds in entry.get("kernel_us", {}).items():
        print(f"    {name:60} {microseconds:8.1f}")


if __name__ == "__main__":
    sys.exit(main())
