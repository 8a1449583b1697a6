"""Tier A: a problem whose exact answer is made of integers, so that one lost or doubled key changes bits.

Scores so small that the softmax is uniform, yet distinct, select w keys a row in an arbitrary order; values
are 0 or 1, dO rows one-hot +-1, the scale and w powers of two. With Q = 0 (run 1: out, dq, dv, dbias) or K =
0 (run 2: out, dk, dv) every product and sum is then an integer over w^2. The answer is counted in integers,
from the heap's selection. Rows that see fewer than w keys carry no dO; their output is held to the rounding
of its division.
"""

from dataclasses import dataclass

import torch

from cases import DTYPES, SCORES, Problem, accumulation
from counters import count
from tiers import SMALLEST, UNIT, Failure

RELATIVE = 4e-6  # of the sum of absolute terms, for kernels that keep P and dS in float32
LARGEST_WINDOW = {"bf16": 256, "f16": 2048, "f32": 1 << 20, "f64": 1 << 20}


@dataclass(frozen=True)
class Probe:
    dtype: str
    keep_window: int  # a power of two
    seqlen_q: int
    seqlen_k: int
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    batch: int = 2
    run: int = 1
    causal: bool = True
    seed: int = 0

    @property
    def id(self) -> str:
        shape = (
            f"B{self.batch}-{self.seqlen_q}x{self.seqlen_k}-H{self.heads_q}/{self.heads_kv}-D{self.head_dim}"
        )
        return f"run{self.run}-{shape}-{self.dtype}-w{self.keep_window}-{'causal' if self.causal else 'full'}"


def make_probe(probe: Probe) -> Problem:
    if probe.keep_window & (probe.keep_window - 1) or probe.keep_window > LARGEST_WINDOW[probe.dtype]:
        raise ValueError(f"{probe.keep_window} is no window for a probe in {probe.dtype}")
    generator = torch.Generator().manual_seed(probe.seed)
    dtype = DTYPES[probe.dtype]
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731
    shape_q = (probe.batch, probe.seqlen_q, probe.heads_q, probe.head_dim)
    shape_k = (probe.batch, probe.seqlen_k, probe.heads_kv, probe.head_dim)
    query, key = integers(-1, 2, *shape_q), integers(-1, 2, *shape_k)
    query, key = (torch.zeros_like(query), key) if probe.run == 1 else (query, torch.zeros_like(key))
    score = SCORES["tiny"]((probe.batch, probe.heads_kv, probe.seqlen_k), generator).to(accumulation(dtype))
    channel = integers(0, probe.head_dim, *shape_q[:3], 1)
    dout = torch.zeros(shape_q).scatter_(-1, channel, (2 * integers(0, 2, *shape_q[:3], 1) - 1).float())
    position = torch.arange(probe.seqlen_q) + probe.seqlen_k - probe.seqlen_q
    sees = position + 1 if probe.causal else torch.full_like(position, probe.seqlen_k)
    dout *= (sees >= probe.keep_window)[:, None, None]
    return Problem(
        query=query.to(dtype),
        key=key.to(dtype),
        value=integers(0, 2, *shape_k).to(dtype),
        dout=dout.to(dtype),
        scale=0.125,
        causal=probe.causal,
        bias=score,
        score=score,
        keep_window=probe.keep_window,
    )


@dataclass
class Counted:
    values: dict[str, torch.Tensor]  # float64, exact
    terms: dict[str, torch.Tensor]  # sums of absolute terms
    full_rows: torch.Tensor  # bool [B, Sq, H, 1]: rows that see w keys
    largest_sum: int  # of integer terms; below 2^24 a float32 sum of them is exact


def count_exactly(problem: Problem) -> Counted:
    """Integer arithmetic on the heap's selection: with n = w keys visible, P = 1/w, dS = (w V - sum V) sign /
    w^2."""
    expiry, w = problem.exact_expiry().long(), problem.keep_window
    query, key, value, dout = (
        t.cpu().long() for t in (problem.query, problem.key, problem.value, problem.dout)
    )
    batch, seqlen_q, heads_q, dim = query.shape
    seqlen_k, heads_kv = key.shape[1:3]
    group = heads_q // heads_kv
    ints = {
        n: torch.zeros(t.shape, dtype=torch.int64)
        for n, t in {"out": query, "dq": query, "dk": key, "dv": key}.items()
    }
    ints["dbias"] = torch.zeros_like(expiry)
    terms = {name: torch.zeros_like(tensor) for name, tensor in ints.items()}
    seen = torch.zeros(batch, seqlen_q, heads_q, 1, dtype=torch.int64)
    j, p = torch.arange(seqlen_k), torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    # Products of integer matrices in float64, exact below 2^53 and much faster than int64.
    dot = lambda a, b: (a.double() @ b.double()).long()  # noqa: E731
    for b in range(batch):
        for h in range(heads_q):
            g = h // group
            ends = expiry[b, g]
            sees = (
                (j <= p) & (p < ends) if problem.causal else (ends > seqlen_k - 1).expand(seqlen_q, -1)
            ).long()
            V, dO = value[b, :, g], dout[b, :, h]
            n = sees.sum(1, keepdim=True)
            total = dot(sees, V)
            dP, D = dot(dO, V.T), (dO * total).sum(1, keepdim=True)
            dS, before = (
                sees * (w * dP - D),
                sees * (w * dP.abs() + D.abs()),
            )  # before: what dS cancelled from
            seen[b, :, h] = n
            ints["out"][b, :, h], terms["out"][b, :, h] = total, total
            for name, at, left, absolute, right in (
                ("dq", (b, slice(None), h), dS, before, key[b, :, g]),
                ("dk", (b, slice(None), g), dS.T, before.T, query[b, :, h]),
                ("dv", (b, slice(None), g), sees.T, sees.T, dO),
            ):
                ints[name][at] += dot(left, right)
                terms[name][at] += dot(absolute, right.abs())
            ints["dbias"][b, g] += dS.sum(0)
            terms["dbias"][b, g] += before.sum(0)
    unit = {
        "out": 1 / seen.clamp(min=1),
        "dq": problem.scale / w**2,
        "dk": problem.scale / w**2,
        "dv": 1 / w,
        "dbias": 1 / w**2,
    }
    largest = max(int(terms[name].max()) for name in ("dq", "dk"))
    return Counted(
        {n: ints[n] * unit[n] for n in ints}, {n: terms[n] * unit[n] for n in ints}, seen == w, largest
    )


def tier_a(
    results: dict[str, torch.Tensor], counted: Counted, probe: Probe, keeps_float32: bool
) -> list[Failure]:
    failures = []
    dtype = DTYPES[probe.dtype]
    exact = not keeps_float32 and dtype not in (torch.float32, torch.float64) and counted.largest_sum <= 2**24
    for name, actual in results.items():
        if name == "lse":
            continue
        value, terms = counted.values[name], counted.terms[name]
        x = actual.detach().cpu()
        if name == "dbias":
            allowed = 0.25 / probe.keep_window**2 + 1e-5 * value.abs()
        elif exact:
            allowed = torch.zeros_like(value)
        else:
            allowed = RELATIVE * terms + 2 * UNIT[dtype] * value.abs() + SMALLEST[dtype]
        if name == "out":
            allowed = torch.where(
                counted.full_rows, allowed, RELATIVE * terms + 3 * UNIT[dtype] * value.abs()
            )
        wanted = value.to(dtype).double() if exact and name != "dbias" else value
        error = (x.double() - wanted).abs()
        count("tier A", x.numel())
        bad = ~(error <= allowed)
        if bad.any():
            worst = tuple(bad.nonzero()[int((error - allowed)[bad].nan_to_num(torch.inf).argmax())].tolist())
            failures.append(
                Failure(
                    f"tier A (run {probe.run})",
                    name,
                    f"{int(bad.sum())} of {bad.numel()} elements; "
                    f"worst {list(worst)}: got {x[worst]:.9g}, counted {wanted[worst]:.9g}, "
                    f"allowed difference {allowed[worst]:.3g}",
                )
            )
    return failures
