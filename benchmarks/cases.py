"""What is measured: every case by name, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OURS = "flash_dmattn"  # the others are the baselines of methods.py
DENSE, MASKED, FLEX, CUDNN = "sdpa-causal", "sdpa-mask", "flex", "sdpa-cudnn"


@dataclass(frozen=True)
class Case:
    """Causal self-attention; scores, like all other inputs, are drawn from the normal distribution."""

    name: str
    suite: str
    seqlen: int
    keep_window: int
    heads: int
    heads_kv: int
    head_dim: int
    backward: bool
    baselines: tuple[str, ...] = ()
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    half: str = ""  # the case of half the length, for the ratio of the times

    @property
    def methods(self) -> tuple[str, ...]:
        return (OURS, *self.baselines)

    def describe(self) -> str:
        return (
            f"B{self.batch} N{self.seqlen} w{self.keep_window} H{self.heads} Hkv{self.heads_kv} "
            f"D{self.head_dim} {str(self.dtype).removeprefix('torch.')} {self.device}, "
            f"forward{' and backward' * self.backward}"
        )


def _cpu(name: str, seqlen: int, head_dim: int, backward: bool, *baselines: str, **changes) -> Case:
    sizes = {"keep_window": 1024, "heads": 8, "heads_kv": 2} | changes
    return Case(name, "cpu", seqlen, head_dim=head_dim, backward=backward, baselines=baselines, **sizes)


def _cuda(name: str, seqlen: int, backward: bool, **changes) -> Case:
    sizes = {"keep_window": 1024, "heads": 16, "heads_kv": 4, "head_dim": 128} | changes
    half_precision = {"baselines": (DENSE, CUDNN, FLEX), "dtype": torch.bfloat16, "device": "cuda"}
    return Case(name, "cuda", seqlen, backward=backward, **sizes, **half_precision)


CASES = (
    Case("smoke", "smoke", 256, 32, 4, 2, 32, backward=True, baselines=(DENSE, MASKED)),
    _cpu("cpu-forward-8192-d64", 8192, 64, False, DENSE, MASKED),
    _cpu("cpu-forward-8192-d128", 8192, 128, False, DENSE, MASKED),
    _cpu("cpu-train-8192-d64", 8192, 64, True, DENSE),
    _cpu("cpu-train-8192-d128", 8192, 128, True, DENSE),
    _cpu("cpu-train-65536", 65536, 64, True, heads=2, heads_kv=1),
    _cpu("cpu-train-131072", 131072, 64, True, heads=2, heads_kv=1, half="cpu-train-65536"),
    _cpu("cpu-train-2048-w256", 2048, 64, True, DENSE, MASKED, keep_window=256),
    _cuda("cuda-train-8192", 8192, True),
    _cuda("cuda-train-32768", 32768, True),
    _cuda("cuda-forward-131072", 131072, False),
)


class Problem(NamedTuple):
    """The tensors of a case, the same for every method."""

    case: Case
    query: Tensor  # [B, N, H, D]
    key: Tensor  # [B, N, Hkv, D]
    value: Tensor
    score: Tensor  # [B, Hkv, N], float32: ranks the keys and is their bias
    dout: Tensor  # like query

    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.score


def make_problem(case: Case) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device, dtype=dtype)

    query, dout = (normal(case.batch, case.seqlen, case.heads, case.head_dim) for _ in range(2))
    key, value = (normal(case.batch, case.seqlen, case.heads_kv, case.head_dim) for _ in range(2))
    score = normal(case.batch, case.heads_kv, case.seqlen, dtype=torch.float32)
    problem = Problem(case, query, key, value, score, dout)
    for tensor in problem.inputs():
        tensor.requires_grad_(case.backward)
    return problem
