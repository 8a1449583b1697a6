"""What is measured: every case, in tables that are measured in this order, the most telling first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

OURS, STAGES = "flash_dmattn", "stages"  # the others are the baselines of methods.py
DENSE, MASKED, FLEX = "sdpa-causal", "sdpa-mask", "flex"
CUDNN, FLASH = "sdpa-cudnn", "sdpa-flash"
BESIDE = (MASKED, CUDNN, FLASH)

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


@dataclass(frozen=True)
class Case:
    """Causal self-attention, or the last seqlen_q queries of it."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    keep_window: int
    suite: str = "forward"
    modes: tuple[str, ...] = ()  # the tables that the case belongs to
    score: str = "iid"  # a key of problem.SCORES
    baselines: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    backward: bool = False
    half: str = ""  # the case of half the length, for the ratio of the times
    label: str = ""

    @property
    def name(self) -> str:
        sizes = f"B{self.batch}-H{self.heads}.{self.heads_kv}-Q{self.seqlen_q}-K{self.seqlen_k}"
        return self.label or f"{self.suite}-{sizes}-D{self.head_dim}-w{self.keep_window}-{self.score}"

    @property
    def group(self) -> int:
        return self.heads // self.heads_kv

    @property
    def methods(self) -> tuple[str, ...]:
        return (OURS, STAGES, *self.baselines)

    def describe(self) -> str:
        return (
            f"B{self.batch} H{self.heads} Hkv{self.heads_kv} Sq{self.seqlen_q} Sk{self.seqlen_k} "
            f"D{self.head_dim} w{self.keep_window} {self.score} {DTYPE_NAMES[self.dtype]} {self.device}, "
            f"forward{' and backward' * self.backward}"
        )

    def dense_key(self) -> tuple:
        """What the time of attention to all keys depends on."""
        sizes = (self.batch, self.heads, self.heads_kv, self.seqlen_q, self.seqlen_k, self.head_dim)
        return (*sizes, self.dtype, self.device, self.backward)


def doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length())]


def _table(suite: str, mode: str, sizes: Iterable[tuple], **changes) -> list[Case]:
    """sizes: B, H, Hkv, Sq, Sk, D, w."""
    shared = {"suite": suite, "modes": (mode,), "baselines": BESIDE, "backward": suite == "backward"}
    return [Case(*size, **(shared | changes)) for size in sizes]


def _merged(*tables: list[Case]) -> list[Case]:
    """A case that is in two tables is measured once, with the baselines of both."""
    merged: dict[Case, Case] = {}
    for case in (case for table in tables for case in table):
        key = replace(case, modes=(), baselines=())
        seen = merged.get(key, key)
        merged[key] = replace(
            case,
            modes=tuple(dict.fromkeys(seen.modes + case.modes)),
            baselines=tuple(dict.fromkeys(seen.baselines + case.baselines)),
        )
    return list(merged.values())


def _self_attention(suite: str, head_dim: int) -> list[list[Case]]:
    lengths, windows = doubling(256, 32768), doubling(32, 32768)
    heads = [(1, 1), (2, 1), (4, 1), (8, 2)]
    return [
        _table(suite, "length", [(1, 2, 1, n, n, head_dim, 1024) for n in reversed(lengths)]),
        _table(suite, "length", [(1, 2, 1, 4096, 4096, head_dim, 1024)], baselines=(FLEX,)),
        _table(suite, "window", [(1, 2, 1, 32768, 32768, head_dim, w) for w in windows]),
        _table(suite, "real", _real(32768, [1024]), baselines=(*BESIDE, FLEX)),
        _table(suite, "real", [s for n in (8192, 32768, 131072) for s in _real(n)] + _real(4096, batch=8)),
        _table(suite, "head_dim", [(1, 2, 1, 4096, 4096, d, 1024) for d in (32, 64, 96, 128, 192, 256)]),
        _table(suite, "heads", [(1, h, hkv, 4096, 4096, head_dim, 1024) for h, hkv in heads]),
        _table(suite, "batch", [(b, 2, 1, 4096, 4096, 32, 1024) for b in (1, 2, 4, 8)]),
    ]


def _real(seqlen: int, windows: Iterable[int] = (1024, 2048, 4096), batch: int = 1) -> list[tuple]:
    return [(batch, 32, 8, seqlen, seqlen, 128, w) for w in windows]


def _other_scores(suite: str) -> list[list[Case]]:
    """Beside nothing: attention to all keys, or to a dense mask, takes the time it takes with iid scores."""
    sizes = [s for n in (32768, 8192, 131072) for s in _real(n)] + _real(4096, batch=8)
    return [_table(suite, "real", sizes, score=score, baselines=()) for score in ("recency", "equal")]


def _decode() -> list[list[Case]]:
    lengths, windows = doubling(256, 524288), doubling(32, 65536)
    return [
        _table("forward", "decode", [(1, 2, 1, 1, k, 128, 1024) for k in reversed(lengths)]),
        _table("forward", "decode_window", [(1, 2, 1, 1, 524288, 128, w) for w in windows]),
    ]


def _cpu(label: str, seqlen: int, head_dim: int, backward: bool, *baselines: str, **changes) -> Case:
    shared = {"batch": 1, "heads": 8, "heads_kv": 2, "keep_window": 1024, "seqlen_q": seqlen}
    shared |= {"suite": "cpu", "modes": ("cpu",), "dtype": torch.float32, "device": "cpu"}
    fixed = {"label": label, "seqlen_k": seqlen, "head_dim": head_dim, "backward": backward}
    return Case(baselines=baselines, **fixed, **(shared | changes))


CASES = (
    *_merged(*_self_attention("forward", 128), *_decode(), *_other_scores("forward")),
    *_merged(*_self_attention("backward", 64), *_other_scores("backward")),
    _cpu("smoke", 256, 32, True, DENSE, MASKED, suite="smoke", heads=4, keep_window=32),
    _cpu("smoke-decode", 256, 32, False, DENSE, MASKED, suite="smoke", keep_window=32, seqlen_q=1),
    _cpu("cpu-forward-8192-d64", 8192, 64, False, DENSE, MASKED),
    _cpu("cpu-forward-8192-d128", 8192, 128, False, DENSE, MASKED),
    _cpu("cpu-train-8192-d64", 8192, 64, True, DENSE),
    _cpu("cpu-train-8192-d128", 8192, 128, True, DENSE),
    _cpu("cpu-train-65536", 65536, 64, True, heads=2, heads_kv=1),
    _cpu("cpu-train-131072", 131072, 64, True, heads=2, heads_kv=1, half="cpu-train-65536"),
    _cpu("cpu-train-2048-w256", 2048, 64, True, DENSE, MASKED, keep_window=256),
)
SUITES = tuple(dict.fromkeys(case.suite for case in CASES))
MODES = tuple(dict.fromkeys(mode for case in CASES for mode in case.modes))


def chosen(suite: str | None, modes: Iterable[str], names: Iterable[str] = ()) -> list[Case]:
    """Those of a suite, only of some of its tables if any are named; and those that are named."""
    modes, names = set(modes), set(names)
    in_suite = [c for c in CASES if c.suite == suite and (not modes or modes & set(c.modes))]
    return in_suite + [c for c in CASES if c.name in names and c not in in_suite]
