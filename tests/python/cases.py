"""What a call is tested on: a Case is a line of numbers that reproduces itself, a Problem its tensors.

`make(case)` draws the tensors on the CPU from the case's seed alone, so that a case means the same bits on
every device. A failing check prints the case's repr; `judge.py` runs it again.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

import ranking

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Case:
    batch: int = 1
    seqlen_q: int = 64
    seqlen_k: int = 64
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 32
    dtype: str = "f32"
    keep_window: int | None = 16  # None: plain attention
    causal: bool = True
    score: str = "normal"  # a key of SCORES
    score_dtype: str | None = None  # None: the accumulation type
    bias: str = "score"  # key-only: "score": the scores themselves; "separate"; "none"
    dense_bias: str | None = None  # instead of it, a bias of this form, such as "B H Sq Sk" or "1 Hkv 1 Sk"
    dense_dtype: str | None = None  # None: the accumulation type
    mask: str | None = None  # of this form
    visible: float = 0.3  # the share of the mask that is True
    scale: float | None = None
    logit: float = 1.0  # standard deviation of scale * <q, k>
    dlse: bool = False
    lengths: tuple[tuple[int, int], ...] | None = None  # (seqlen_q, seqlen_k) of packed sequences
    num_sinks: int = 0
    local_window: int = 0
    seed: int = 0

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return "Case(" + ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed) + ")"

    def sizes(self, form: str) -> list[int]:
        axes = dict(B=self.batch, H=self.heads_q, Hkv=self.heads_kv, Sq=self.seqlen_q, Sk=self.seqlen_k)
        return [1 if axis == "1" else axes[axis] for axis in form.split()]

    @property
    def id(self) -> str:
        shape = "+".join(f"{q}x{k}" for q, k in self.lengths) if self.lengths is not None else None
        shape = shape or f"B{self.batch}-{self.seqlen_q}x{self.seqlen_k}"
        extras = [
            "causal" if self.causal else "full",
            self.score if self.keep_window is not None else "",
            f"bias={self.bias}" if self.bias != "score" else "",
            f"bias[{self.dense_bias}]{self.dense_dtype or ''}" if self.dense_bias else "",
            f"mask[{self.mask}]{self.visible:g}" if self.mask else "",
            f"scale={self.scale}" if self.scale is not None else "",
            f"logit={self.logit:g}" if self.logit != 1 else "",
            f"scores={self.score_dtype}" if self.score_dtype else "",
            f"sinks{self.num_sinks}" if self.num_sinks else "",
            f"local{self.local_window}" if self.local_window else "",
            "dlse" if self.dlse else "",
        ]
        head = f"{shape}-H{self.heads_q}/{self.heads_kv}-D{self.head_dim}-{self.dtype}-w{self.keep_window}"
        return "-".join([head, *filter(None, extras)])


@dataclass(frozen=True)
class Problem:
    """The tensors of one call. score None: the selection is `fixed_expiry`, or plain attention if that is
    None too."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dout: torch.Tensor
    scale: float
    causal: bool = True
    bias: torch.Tensor | None = None  # key-only, or dense: [B or 1, 1 or Hkv or H, Sq or 1, Sk]
    mask: torch.Tensor | None = None  # bool, dense
    score: torch.Tensor | None = None
    keep_window: int | None = None
    num_sinks: int = 0
    local_window: int = 0
    fixed_expiry: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    dlse: torch.Tensor | None = None

    @property
    def has_dense_bias(self) -> bool:
        return self.bias is not None and self.bias.dim() == 4

    @property
    def is_dense(self) -> bool:
        return self.mask is not None or self.has_dense_bias

    def replace(self, **changes) -> "Problem":
        return replace(self, **changes)

    def map(self, function) -> "Problem":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})

    def to(self, device: str) -> "Problem":
        return self if device == "cpu" else self.map(lambda tensor: tensor.to(device))

    def exact_expiry(self) -> torch.Tensor | None:
        """The selection by the heap; a key whose bias is -inf is disabled like one whose score is."""
        if self.score is None:
            return None if self.fixed_expiry is None else self.fixed_expiry.cpu()
        return ranking.expiry(
            self.ranked_score(),
            self.keep_window,
            self.causal,
            self.num_sinks,
            self.local_window,
            None if self.cu_seqlens_k is None else self.cu_seqlens_k.cpu(),
        )

    def ranked_score(self) -> torch.Tensor:
        if self.bias is None or self.bias is self.score or self.has_dense_bias:
            return self.score
        disabled = (self.bias == -torch.inf).expand(self.score.shape)
        return self.score.masked_fill(disabled, -torch.inf)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sprinkled(shape, generator, value):
    return _normal(shape, generator).masked_fill(_uniform(shape, generator) < 0.3, value)


def _tiny(shape, generator):
    """Distinct in order, and too small to move a softmax: +-2^-24 .. 2^-84."""
    sign = torch.where(_uniform(shape, generator) < 0.5, -1.0, 1.0)
    return sign * 2.0 ** (-24 - 60 * _uniform(shape, generator))


# The length of a sequence is the last axis; each returns float64, rounded later to the score's type.
SCORES = {
    "normal": _normal,
    "equal": lambda shape, g: torch.full(shape, 0.25, dtype=torch.float64),
    "two_values": lambda shape, g: torch.where(_uniform(shape, g) < 0.5, 1.0, -1.0).double(),
    "quantised": lambda shape, g: (4 * _normal(shape, g)).round() / 4,
    "rising": lambda shape, g: torch.arange(shape[-1]).double().div(max(1, shape[-1])).expand(shape).clone(),
    "falling": lambda shape, g: (
        torch.arange(shape[-1]).double().div(-max(1, shape[-1])).expand(shape).clone()
    ),
    "signed_zero": lambda shape, g: torch.where(_uniform(shape, g) < 0.5, 0.0, -0.0).double(),
    "minus_inf": lambda shape, g: _sprinkled(shape, g, -torch.inf),
    "nan": lambda shape, g: _sprinkled(shape, g, torch.nan),
    "denormal": lambda shape, g: _normal(shape, g) * 2.0**-140,
    "disabled": lambda shape, g: torch.full(shape, -torch.inf, dtype=torch.float64),
    "tiny": _tiny,
}


def draw_score(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Scores as select takes them: float64 numbers of SCORES rounded to dtype."""
    return SCORES[kind](shape, torch.Generator().manual_seed(seed)).to(dtype)


def make(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    packed = case.lengths is not None
    heads_q, heads_kv, dim = case.heads_q, case.heads_kv, case.head_dim
    if packed:
        lead_q, lead_k = (sum(q for q, _ in case.lengths),), (sum(k for _, k in case.lengths),)
        lse_shape, key_shape = (heads_q, *lead_q), (heads_kv, *lead_k)
    else:
        lead_q, lead_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
        lse_shape, key_shape = (case.batch, heads_q, case.seqlen_q), (case.batch, heads_kv, case.seqlen_k)

    def per_key(kind: str, to: torch.dtype) -> torch.Tensor:
        drawn = SCORES[kind](key_shape, generator).to(to)
        return drawn.T.contiguous() if packed else drawn

    scale = dim**-0.5 if case.scale is None else case.scale
    stretch = (case.logit / (abs(scale) * dim**0.5)) ** 0.5 if scale else 1.0
    query = (stretch * _normal((*lead_q, heads_q, dim), generator)).to(dtype)
    key = (stretch * _normal((*lead_k, heads_kv, dim), generator)).to(dtype)
    value = _normal((*lead_k, heads_kv, dim), generator).to(dtype)
    dout = _normal((*lead_q, heads_q, dim), generator).to(dtype)
    score = bias = None
    if case.keep_window is not None:
        score = per_key(case.score, DTYPES[case.score_dtype] if case.score_dtype else accumulation(dtype))
    if case.bias == "separate":
        bias = per_key("normal", accumulation(dtype))
    elif case.bias == "score" and score is not None:
        bias = score if score.dtype == accumulation(dtype) else score.to(accumulation(dtype))
    cu = [None, None]
    if packed:
        cu = [
            torch.tensor([0, *accumulate(n[side] for n in case.lengths)], dtype=torch.int32)
            for side in (0, 1)
        ]
    dlse = _normal(lse_shape, generator).to(accumulation(dtype)) if case.dlse else None
    mask = None
    if case.mask is not None:
        mask = _uniform(case.sizes(case.mask), generator) < case.visible
    if case.dense_bias is not None:
        drawn = _normal(case.sizes(case.dense_bias), generator)
        drawn.masked_fill_(_uniform(drawn.shape, generator) < 0.1, -torch.inf)
        bias = drawn.to(DTYPES[case.dense_dtype] if case.dense_dtype else accumulation(dtype))
    return Problem(
        query=query,
        key=key,
        value=value,
        dout=dout,
        scale=scale,
        causal=case.causal,
        bias=bias,
        mask=mask,
        score=score,
        keep_window=case.keep_window,
        num_sinks=case.num_sinks,
        local_window=case.local_window,
        cu_seqlens_q=cu[0],
        cu_seqlens_k=cu[1],
        dlse=dlse,
    )
