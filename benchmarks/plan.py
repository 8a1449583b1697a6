"""What the plan costs: time beside the selection's, bytes, list entries per key, computed over needed pairs.

    python benchmarks/plan.py
    python benchmarks/plan.py --runs 21 --out plan.json

One line per shape and kind of scores. Before a plan is timed, the lists of its first head are compared with
those of the model in tests/python/plan_model.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import environment
from timing import timed

sys.path.append(str(Path(__file__).parents[1] / "tests" / "python"))

import plan_model  # noqa: E402

HOST_CALLS = 20  # whose time on the host is measured together, without a synchronisation


@dataclass(frozen=True)
class Shape:
    name: str
    seqlen_k: int
    heads: int
    keep_window: int
    num_queries: int | None = None  # None: all
    own_expiry: bool = False  # the plan is not told of the window


SHAPES = (
    Shape("short", 32_768, 8, 1024),
    Shape("middle", 131_072, 8, 2048),
    Shape("long", 1_048_576, 8, 4096),
    Shape("one head", 32_768, 1, 1024),
    Shape("decode", 524_288, 8, 2048, num_queries=1),
    Shape("decode, wide", 524_288, 1, 65_536, num_queries=1),
    Shape("wide", 131_072, 8, 16_384),
    Shape("own expiry", 32_768, 8, 1024, own_expiry=True),
    Shape("own expiry, long", 1_048_576, 8, 4096, own_expiry=True),
)
SCORES = {
    "iid": lambda n, heads: torch.randn(1, heads, n, device="cuda"),
    "recency": lambda n, heads: (
        torch.randn(1, heads, n, device="cuda") + 30 * torch.arange(n, device="cuda") / n
    ),
    "equal": lambda n, heads: torch.full((1, heads, n), 0.5, device="cuda"),
}


def measure(shape: Shape, scores: str, runs: int) -> dict[str, object]:
    ops, n = torch.ops.flash_dmattn, shape.seqlen_k
    torch.manual_seed(0)
    score = SCORES[scores](n, shape.heads)
    num_queries = n if shape.num_queries is None else shape.num_queries
    window = 0 if shape.own_expiry else shape.keep_window
    expiry = ops.select(score, shape.keep_window, True, 0, 0, None, num_queries)

    def plan() -> Tensor:
        return ops.plan(expiry, score, None, None, None, num_queries, window, True)

    def select_and_plan(mark) -> None:
        ops.select(score, shape.keep_window, True, 0, 0, None, num_queries)
        mark("select")
        plan()
        mark("plan")

    entry = asdict(shape) | {"scores": scores} | check(plan(), expiry, score, num_queries, window)
    samples = [timed("cuda", select_and_plan) for _ in range(runs + 2)][2:]
    for stage in ("select", "plan"):
        entry[f"{stage}_us"] = [1e6 * sample[stage] for sample in samples]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        plan()
    entry["host_us"] = 1e6 * (time.perf_counter() - start) / HOST_CALLS
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    entry["plan_bytes"] = 4 * plan().numel()
    entry["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return entry


def check(plan: Tensor, expiry: Tensor, score: Tensor, num_queries: int, window: int) -> dict[str, float]:
    """The lists of head 0 are the model's, or SystemExit; their statistics."""
    heads, n = expiry.shape[1:]
    bound = plan_model.length_bound(n, window, True, True)
    first, scores = expiry[0, 0].cpu().numpy(), score[0, 0].cpu().numpy()
    length, wanted = plan_model.plan_of_head(first, scores, None, num_queries, n, bound, True)
    wanted = {index: segment for index, segment in wanted.items() if len(segment.keys)}
    found_length, found = plan_model.PlanMemory(plan, n, 1, heads, False, bound).head(0, 0, 0, n, True)
    same = found_length == length and found.keys() == wanted.keys()
    for index, segment in wanted.items() if same else ():
        same &= all(
            np.array_equal(getattr(found[index], name), getattr(segment, name))
            for name in ("keys", "expiry", "hulls")
        )
    if not same:
        raise SystemExit("the plan is wrong: pytest tests/python/test_plan.py --kernel cuda")
    ratio, entries = plan_model.waste(found, first, num_queries)
    return {"segment_length": length, "waste": ratio, "entries_per_key": entries}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11, help="timed repetitions (default: %(default)s)")
    parser.add_argument(
        "--shape", action="append", choices=[shape.name for shape in SHAPES], help="default: all"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    columns = "shape              keys heads     w scores    | plan us (p10, p90) | select us | host us"
    print(f"{columns} |    L | entries/key waste | plan MB, peak MB")
    results = []
    for shape in SHAPES:
        for scores in SCORES if not options.shape or shape.name in options.shape else ():
            entry = measure(shape, scores, options.runs)
            results.append(entry)
            times = sorted(entry["plan_us"])
            low, high = times[len(times) // 10], times[-1 - len(times) // 10]
            print(
                f"{shape.name:16} {shape.seqlen_k:>7} {shape.heads:>5} {shape.keep_window:>5} {scores:9} | "
                f"{statistics.median(times):7.1f} ({low:.1f}, {high:.1f}) | "
                f"{statistics.median(entry['select_us']):7.1f} | {entry['host_us']:5.1f} | "
                f"{entry['segment_length']:>6} | {entry['entries_per_key']:.2f} {entry['waste']:.3f} | "
                f"{entry['plan_bytes'] / 1e6:.1f}, {entry['peak_bytes'] / 1e6:.1f}",
                flush=True,
            )
    if options.out:
        options.out.write_text(
            json.dumps({"environment": environment.describe(), "plans": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
