"""The figures that the CUDA kernels have to reach, each measured and said to be reached or not.

    python benchmarks/figures.py --out benchmarks/results/figures.json

Made for an H200. Baselines are measured in the same run; every method is checked before (measure.py).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import environment
from flash_dmattn import flash_dmattn_func
from measure import Options, measure_case, statistic
from problem import SCORES, exact_expiry, make_problem
from run import write
from suites import BESIDE, CUDNN, MASKED, OURS, STAGES, Case
from timing import extra_bytes, timed


@dataclass
class Figure:
    what: str
    value: float | None  # None: not measured, and detail says why
    unit: str
    limit: float
    at_least: bool = False
    aim: float | None = None
    detail: str = ""

    @property
    def reached(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g} {self.unit}"
        asked = f"{'at least' if self.at_least else 'at most'} {self.limit:.4g}"
        asked += f", aim {self.aim:g}" if self.aim else ""
        verdict = "reached" if self.reached else "NOT REACHED"
        return f"{verdict:>11}  {self.what}: {value} ({asked}) {self.detail}"


SELECTIONS = ((32768, 8, 1024, 60e-6), (131072, 8, 2048, 200e-6), (1048576, 8, 4096, 1.5e-3))


def _shape(case: Case) -> str:
    sizes = (case.batch, case.heads, case.heads_kv, case.seqlen_q, case.seqlen_k, case.head_dim)
    return f"{(*sizes, case.keep_window)}{', equal scores' * (case.score == 'equal')}"


def _median(entry: dict, method: str, stage: str) -> float:
    if method not in entry["methods"]:
        raise RuntimeError(f"{method}: {entry['not_run'][method]}")
    return entry["methods"][method]["seconds"][stage]["median"]


def against_mask(keep: list[dict], options: Options) -> Iterator[Figure]:
    case = Case(1, 2, 1, 32768, 32768, 64, 1024, "figures", baselines=BESIDE, backward=True)
    entry = measure_case(case, options, [])
    keep.append(entry)
    for stage, limit in (("forward", 12.0), ("backward", 8.0)):
        ours, mask = (_median(entry, method, stage) for method in (OURS, MASKED))
        detail = f"{1e3 * ours:.3f} ms end to end, SDPA with the dense mask {1e3 * mask:.3f} ms"
        yield Figure(f"{stage} {_shape(case)}", mask / ours, "times", limit, at_least=True, detail=detail)


def throughput(keep: list[dict], options: Options) -> Iterator[Figure]:
    beside = tuple(name for name in BESIDE if name != MASKED)
    case = Case(1, 32, 8, 32768, 32768, 128, 1024, "figures", baselines=beside, backward=True)
    entry = measure_case(case, options, [])
    keep.append(entry)
    for stage, limit, aim in (("forward", 160.0, 220.0), ("backward", 90.0, 130.0)):
        seconds = _median(entry, STAGES, stage)
        rate = entry["methods"][STAGES]["gflops"][stage] / 1e3
        what = f"{stage} kernel {_shape(case)}"
        yield Figure(what, rate, "TFLOP/s", limit, True, aim, f"{1e3 * seconds:.3f} ms")


def selection_and_plan(keep: list[dict], options: Options) -> Iterator[Figure]:
    for seqlen, heads_kv, window, limit in SELECTIONS:
        for kind in ("iid", "recency"):
            samples = _select_and_plan(seqlen, heads_kv, window, kind, options)
            found = {stage: statistic([sample[stage] for sample in samples]) for stage in samples[0]}
            name = f"N{seqlen} Hkv{heads_kv} w{window} {kind}"
            keep.append({"name": f"select and plan {name}", "seconds": found})
            select, plan = (1e6 * found[stage]["median"] for stage in ("select", "plan"))
            yield Figure(f"selection {name}", select, "us", 1e6 * limit)
            yield Figure(f"plan {name}", plan, "us", select, detail="the selection's time")


def _select_and_plan(seqlen: int, heads_kv: int, window: int, kind: str, options: Options) -> list[dict]:
    ops = torch.ops.flash_dmattn
    generator = torch.Generator("cuda").manual_seed(options.seed)
    score = SCORES[kind](torch.randn(1, heads_kv, seqlen, generator=generator, device="cuda"))
    exact = ops.select(score.cpu(), window, True, 0, 0, None)

    def work(mark: Callable[[str], None]) -> None:
        expiry = ops.select(score, window, True, 0, 0, None)
        mark("select")
        ops.plan(expiry, score, score, None, None, seqlen, window, True)
        mark("plan")

    if not torch.equal(ops.select(score, window, True, 0, 0, None).cpu(), exact):
        raise RuntimeError(f"the selection of N{seqlen} w{window} {kind} is wrong")
    return [timed("cuda", work) for _ in range(options.warmup + 2 * options.runs)][options.warmup :]


# Shape, useful TFLOP/s of the kernel asked for and aimed at, times as fast as dense cuDNN end to end.
HOPPER_FORWARD = (
    ((1, 32, 8, 32768, 128, 1024), 500.0, 580.0, 12.0),
    ((1, 32, 8, 32768, 128, 2048), 530.0, 620.0, None),
    ((1, 32, 8, 131072, 128, 2048), 530.0, 620.0, 27.0),
    ((1, 32, 8, 8192, 128, 1024), 450.0, None, 2.8),
    ((1, 16, 16, 16384, 128, 1024), 430.0, None, None),
    ((4, 32, 8, 8192, 64, 1024), 290.0, None, None),
)


def hopper_forward(keep: list[dict], options: Options) -> Iterator[Figure]:
    """The forward kernel, packing of keys included, and whole calls beside dense causal cuDNN."""
    for (batch, heads, heads_kv, seqlen, head_dim, window), asked, aim, times in HOPPER_FORWARD:
        rates: dict[str, float] = {}
        for kind in ("iid", "recency", "equal"):
            beside = (CUDNN,) if times is not None and kind == "iid" else ()
            sizes = (batch, heads, heads_kv, seqlen, seqlen, head_dim, window)
            case = Case(*sizes, "hopper", score=kind, baselines=beside)
            entry = measure_case(case, options, [])
            keep.append(entry)
            rates[kind] = entry["methods"][STAGES]["gflops"]["forward"] / 1e3
            what = f"forward kernel {_shape(case)}"
            stages = ", ".join(
                f"{stage} {1e3 * _median(entry, STAGES, stage):.3f} ms"
                for stage in ("select", "plan", "forward")
            )
            if kind == "iid":
                yield Figure(what, rates[kind], "TFLOP/s", asked, True, aim, stages)
            else:
                slower = 100 * (rates["iid"] / rates[kind] - 1)
                yield Figure(f"{what}, {kind}", slower, "% slower than iid", 10.0, detail=stages)
            if beside:
                ours, dense = (_median(entry, method, "forward") for method in (OURS, CUDNN))
                detail = f"{1e3 * ours:.3f} ms, dense causal cuDNN {1e3 * dense:.3f} ms"
                yield Figure(f"forward {_shape(case)}", dense / ours, "times", times, True, detail=detail)
            torch.cuda.empty_cache()
    yield from _original_shape(keep, options)
    yield from _nothing_dropped(keep, options)


def _original_shape(keep: list[dict], options: Options) -> Iterator[Figure]:
    case = Case(1, 2, 1, 32768, 32768, 64, 1024, "hopper", baselines=(MASKED,))
    entry = measure_case(case, options, [])
    keep.append(entry)
    kernel = 1e3 * _median(entry, STAGES, "forward")
    yield Figure(f"forward kernel {_shape(case)}", kernel, "ms", 0.062, aim=0.05)
    ours, mask = (_median(entry, method, "forward") for method in (OURS, MASKED))
    detail = f"{1e3 * ours:.3f} ms end to end, SDPA with the dense mask {1e3 * mask:.3f} ms"
    yield Figure(f"forward {_shape(case)}", mask / ours, "times", 18.0, at_least=True, detail=detail)


def _nothing_dropped(keep: list[dict], options: Options) -> Iterator[Figure]:
    case = Case(1, 32, 8, 4096, 4096, 128, 4096, "hopper", baselines=(CUDNN,))
    entry = measure_case(case, options, [])
    keep.append(entry)
    ours, dense = _median(entry, STAGES, "forward"), _median(entry, CUDNN, "forward")
    detail = f"{1e3 * ours:.3f} ms, dense causal cuDNN {1e3 * dense:.3f} ms"
    what = f"forward kernel, nothing dropped, {_shape(case)}"
    yield Figure(what, dense / ours, "of cuDNN's speed", 0.75, True, 0.9, detail)


def memory(keep: list[dict], options: Options) -> Iterator[Figure]:
    for kind in ("iid", "equal"):
        case = Case(1, 32, 8, 131072, 131072, 128, 2048, "figures", score=kind, backward=True)
        problem = make_problem(case, options.seed)
        found = extra_bytes(problem, OURS, "")
        inputs = sum(x.numel() * x.element_size() for x in (*problem.inputs(), problem.dout))
        keep.append({"name": f"memory {case.name}", "inputs": inputs, **found})
        extra, whole = found["extra"] - found["results"], inputs + found["results"]
        detail = f"{extra / 1e6:.0f} MB beyond {whole / 1e6:.0f} MB"
        what = f"extra memory, forward and backward, {_shape(case)}"
        yield Figure(what, 100 * extra / whole, "%", 15.0, detail=detail)
        del problem
        torch.cuda.empty_cache()


def time_per_token(keep: list[dict], options: Options) -> Iterator[Figure]:
    """The largest over the smallest, over lengths."""
    times: dict[str, dict[int, float]] = {"forward": {}, "backward": {}}
    for seqlen in (32768, 65536, 131072, 262144, 524288):
        case = Case(1, 32, 8, seqlen, seqlen, 128, 1024, "figures", backward=True)
        entry = measure_case(case, Options(max(3, options.runs // 2), 1, options.seed, 10.0, False), [])
        keep.append(entry)
        for stage, by_length in times.items():
            by_length[seqlen] = 1e9 * _median(entry, OURS, stage) / seqlen
        torch.cuda.empty_cache()
    for stage, by_length in times.items():
        spread = 100 * (max(by_length.values()) / min(by_length.values()) - 1)
        detail = ", ".join(f"{seqlen}: {value:.2f} ns" for seqlen, value in by_length.items())
        yield Figure(f"time per token, {stage}, H32 Hkv8 D128 w1024", spread, "% apart", 10.0, detail=detail)


def decode(keep: list[dict], options: Options) -> Iterator[Figure]:
    """One query over a cache: selection and attention together, beside dense attention over all of it."""
    shapes = (
        (32, 8, 128, 131072, 2048, 3.0),
        (32, 8, 128, 524288, 2048, 10.0),
        (2, 1, 128, 524288, 1024, None),
    )
    for heads, heads_kv, head_dim, seqlen, window, times in shapes:
        query, key, value, score = _decode_inputs(heads, heads_kv, head_dim, seqlen, options.seed)
        _check_decode(query, key, value, score, window)
        name = f"decode {(1, heads, heads_kv, 1, seqlen, head_dim, window)}"

        def ours(mark: Callable[[str], None]) -> None:
            flash_dmattn_func(query, key, value, attn_bias=score, keep_window_size=window, is_causal=True)
            mark("ours")

        def stages(mark: Callable[[str], None]) -> None:
            expiry = torch.ops.flash_dmattn.select(score, window, True, 0, 0, None, 1)
            mark("select")
            flash_dmattn_func(query, key, value, attn_bias=score, expiry=expiry, is_causal=True)
            mark("attention")

        def dense(mark: Callable[[str], None]) -> None:
            rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(*rows, enable_gqa=True)
            mark("dense cuDNN")

        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for run_index in range(options.warmup + 3 * options.runs):
                for work in (ours, stages, dense):
                    for stage, seconds in timed("cuda", work).items():
                        if run_index >= options.warmup:
                            found.setdefault(stage, []).append(seconds)
        medians = {stage: statistic(samples) for stage, samples in found.items()}
        keep.append({"name": name, "seconds": medians})
        micros = {stage: 1e6 * entry["median"] for stage, entry in medians.items()}
        detail = ", ".join(f"{stage} {value:.1f} us" for stage, value in micros.items())
        if times is None:
            yield Figure(name, micros["ours"], "us", 45.0, detail=detail)
        else:
            ratio = micros["dense cuDNN"] / micros["ours"]
            yield Figure(name, ratio, "times", times, at_least=True, detail=detail)
        torch.cuda.empty_cache()


def _decode_inputs(heads: int, heads_kv: int, head_dim: int, seqlen: int, seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    shapes = (1, heads), (seqlen, heads_kv), (seqlen, heads_kv)
    rows = [draw(1, *shape, head_dim).bfloat16() for shape in shapes]
    return [*rows, draw(1, heads_kv, seqlen)]


def _check_decode(query: Tensor, key: Tensor, value: Tensor, score: Tensor, window: int) -> None:
    """Against float64 over the keys that torch.topk finds; scores of one seed are distinct around the last."""
    out = flash_dmattn_func(query, key, value, attn_bias=score, keep_window_size=window, is_causal=True)
    best, index = score.double().topk(window)  # [1, Hkv, w]
    heads_kv = key.shape[2]

    def selected(rows: Tensor) -> Tensor:  # [1, Hkv, w, D]
        return rows.transpose(1, 2).double().gather(2, index[..., None].expand(-1, -1, -1, rows.shape[-1]))

    grouped = query.double().unflatten(2, (heads_kv, -1))[:, 0]  # [1, Hkv, group, D]
    logits = grouped @ selected(key).mT * query.shape[-1] ** -0.5 + best.unsqueeze(2)
    exact = (logits.softmax(-1) @ selected(value)).flatten(1, 2).unsqueeze(1)
    error = (out.double() - exact).norm() / exact.norm()
    if not error < 4e-3:
        raise RuntimeError(f"decode over {key.shape[1]} keys is wrong: relative error {error:.2e}")


def dense_mask(keep: list[dict], options: Options) -> Iterator[Figure]:
    """A random top-w mask per query and a dense bias, with its gradient, beside SDPA with the same."""
    seqlen, heads, head_dim, window = 16384, 2, 128, 1024
    generator = torch.Generator("cuda").manual_seed(options.seed)
    rows = [
        torch.randn(1, seqlen, n, head_dim, generator=generator, device="cuda").bfloat16()
        for n in (heads, 1, 1, heads)
    ]
    query, key, value = (tensor.requires_grad_() for tensor in rows[:3])
    dout = rows[3]
    bias = torch.randn(1, heads, seqlen, seqlen, generator=generator, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(bias.shape, dtype=torch.bool, device="cuda")
    for head in range(heads):
        order = torch.rand(seqlen, seqlen, generator=generator, device="cuda")
        mask[0, head].scatter_(-1, order.topk(window).indices, True)
        del order
    bias.requires_grad_()
    inputs = query, key, value, bias

    def ours(mark: Callable[[str], None]) -> tuple[Tensor, ...]:
        out = flash_dmattn_func(query, key, value, attn_mask=mask, attn_bias=bias)
        mark("ours forward")
        grads = torch.autograd.grad(out, inputs, dout)
        mark("ours backward")
        return out, *grads

    def theirs(mark: Callable[[str], None]) -> tuple[Tensor, ...]:
        hidden = bias.masked_fill(~mask, -math.inf)
        to_heads = (
            query.transpose(1, 2),
            *(tensor.transpose(1, 2).expand(-1, heads, -1, -1) for tensor in (key, value)),
        )
        out = torch.nn.functional.scaled_dot_product_attention(*to_heads, attn_mask=hidden).transpose(1, 2)
        mark("SDPA forward")
        grads = torch.autograd.grad(out, inputs, dout)
        mark("SDPA backward")
        return out, *grads

    for mine, other in zip(ours(lambda stage: None), theirs(lambda stage: None)):
        error = ((mine.float() - other.float()).norm() / other.float().norm()).item()
        if not error < 2e-2:  # both are bfloat16
            raise RuntimeError(f"dense mask: relative difference from SDPA {error:.2e}")
        del mine, other
    found: dict[str, list[float]] = {}
    for run_index in range(options.warmup + options.runs):
        for work in (ours, theirs):
            for stage, seconds in timed("cuda", work).items():
                if run_index >= options.warmup:
                    found.setdefault(stage, []).append(seconds)
    medians = {stage: statistic(samples) for stage, samples in found.items()}
    name = f"dense mask and bias {(1, heads, 1, seqlen, seqlen, head_dim)}, forward and backward"
    keep.append({"name": name, "seconds": medians})
    millis = {stage: 1e3 * entry["median"] for stage, entry in medians.items()}
    ratio = (millis["SDPA forward"] + millis["SDPA backward"]) / (
        millis["ours forward"] + millis["ours backward"]
    )
    detail = ", ".join(f"{stage} {value:.2f} ms" for stage, value in millis.items())
    yield Figure(name, ratio, "times", 2.0, at_least=True, detail=detail)


def host_time(keep: list[dict], options: Options) -> Iterator[Figure]:
    """What one call keeps the host busy for, while the device has room in its queue."""
    case = Case(1, 8, 2, 1024, 1024, 64, 256, "figures")
    problem = make_problem(case, options.seed)
    expiry = exact_expiry(problem)
    selecting = {"keep_window_size": case.keep_window}
    for name, selection, limit in (("", selecting, 45.0), (", expiry given", {"expiry": expiry}, 25.0)):
        query, key, value, score = problem.inputs()
        samples = []
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                flash_dmattn_func(query, key, value, attn_bias=score, is_causal=True, **selection)
            samples.append((time.perf_counter() - start) / 50)
        found = statistic(samples[5:])
        keep.append({"name": f"host time{name}", "seconds": found})
        yield Figure(f"host time of a forward without gradients{name}", 1e6 * found["median"], "us", limit)


SECTIONS = (
    host_time,
    selection_and_plan,
    decode,
    dense_mask,
    against_mask,
    throughput,
    hopper_forward,
    memory,
    time_per_token,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sections", help="names of sections to measure, with commas between; default: all")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="no section begins after this long"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    options = Options(arguments.runs, arguments.warmup, arguments.seed, 10.0)
    found: dict = {
        "environment": environment.describe(),
        "options": vars(options),
        "figures": [],
        "measured": [],
    }
    print("\n".join(f"{name}: {value}" for name, value in found["environment"].items()))
    started, complete = time.perf_counter(), True
    chosen = arguments.sections.split(",") if arguments.sections else [x.__name__ for x in SECTIONS]
    for section in (section for section in SECTIONS if section.__name__ in chosen):
        elapsed = time.perf_counter() - started
        print(f"\n{section.__name__.replace('_', ' ')} ({elapsed:.0f} s)", flush=True)
        try:
            if elapsed > arguments.budget_seconds:
                raise RuntimeError("no time was left")
            for figure in section(found["measured"], options):
                print(figure.line(), flush=True)
                found["figures"].append(vars(figure) | {"reached": figure.reached})
        except Exception as error:  # the other sections are still worth having
            complete = False
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"not measured: {reason}", flush=True)
            found["figures"].append(
                {"what": section.__name__, "value": None, "reached": False, "detail": reason}
            )
        found["seconds"] = time.perf_counter() - started
        write(arguments.out, found)
        torch.cuda.empty_cache()
    reached = sum(figure["reached"] for figure in found["figures"])
    print(f"\n{reached} of {len(found['figures'])} figures reached, in {found['seconds']:.0f} s")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
