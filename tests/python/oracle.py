"""Forward and backward in float64 on the rounded inputs, with the terms that bound a kernel's error.

`expected(problem)` returns an Answer per tensor: its value, the sum of the absolute values of what was added
up, and its variance as the kernels' roundings make it, split by cause so that one pass serves every rule of
tiers.py:

    variance = h^2 * matrix + h_subnormal^2 * subnormal + (u_o / 2)^2 * output + h_logit^2 * logit + exact

h is half the unit roundoff of P and dS where they enter a matrix product, h_subnormal half the largest error
of rounding a float16 subnormal, for those so small that they become one; u_o that of the stored output, from
which the backward takes delta; h_logit that of the float32 logits, for dbias, whose terms are summed before
dS is rounded; `exact` is the float32 arithmetic of dP and delta. Rows are taken in chunks: memory stays
bounded by CHUNK elements a matrix. The selection is the heap's (ranking.py), never a kernel's.
"""

from dataclasses import dataclass

import torch

from cases import Problem, accumulation

CHUNK = 1 << 20
FLOAT32 = 2.0**-24
FLOAT16_SUBNORMAL = 2.0**-25  # the largest error of rounding to one


@dataclass
class Answer:
    value: torch.Tensor
    terms: torch.Tensor
    matrix: torch.Tensor
    subnormal: torch.Tensor  # float16 inputs only
    output: torch.Tensor
    logit: torch.Tensor
    exact: torch.Tensor

    @classmethod
    def zeros(cls, shape) -> "Answer":
        return cls(*(torch.zeros(shape, dtype=torch.float64) for _ in range(7)))

    def map(self, function) -> "Answer":
        return Answer(*(function(part) for part in vars(self).values()))

    def __getitem__(self, index) -> "Answer":
        """A view: what is written to it is written to the whole."""
        return self.map(lambda part: part[index])


@dataclass
class Expected:
    tensors: dict[str, Answer]  # out, lse, dq, dk, dv and, with a bias, dbias
    # Of the logits that some row sees; or the products it cancelled from, less the 8 that every rule allows.
    largest_logit: float
    expiry: torch.Tensor | None
    dbias_dtype: torch.dtype


def expected(problem: Problem) -> Expected:
    query, key, value, dout = (
        getattr(problem, name).detach().cpu().double() for name in ("query", "key", "value", "dout")
    )
    packed = problem.cu_seqlens_q is not None
    heads_q, heads_kv = query.shape[-2], key.shape[-2]
    lse_shape = (heads_q, query.shape[0]) if packed else (query.shape[0], heads_q, query.shape[1])
    bias_shape = key.shape[:-1] if packed else (key.shape[0], heads_kv, key.shape[1])
    has_bias = problem.bias is not None
    dense_mask = None if problem.mask is None else _expanded(problem, problem.mask)
    dense_bias = _expanded(problem, problem.bias) if problem.has_dense_bias else None
    bias, dlse = torch.zeros(bias_shape).double(), torch.zeros(lse_shape).double()
    if has_bias and dense_bias is None:
        bias = problem.bias.detach().cpu().double().expand(bias_shape)
    if problem.dlse is not None:
        dlse = problem.dlse.cpu().double()
    expiry = problem.exact_expiry()

    tensors = {
        name: Answer.zeros(like.shape)
        for name, like in {"out": query, "dq": query, "dk": key, "dv": value}.items()
    }
    tensors["lse"] = Answer.zeros(lse_shape)
    if has_bias:
        tensors["dbias"] = Answer.zeros(bias_shape if dense_bias is None else dense_bias.shape)
    largest = 0.0
    for rows, keys, lse_at, bias_at, batch in _sequences(problem):
        for g in range(heads_kv):
            group = slice(g * heads_q // heads_kv, (g + 1) * heads_q // heads_kv)
            per_key = (*bias_at, g) if packed else (batch, g)
            dense = (batch, group)
            part = {
                "out": tensors["out"][(*rows, group)],
                "dq": tensors["dq"][(*rows, group)],
                "dk": tensors["dk"][(*keys, g)],
                "dv": tensors["dv"][(*keys, g)],
                "lse": tensors["lse"][(group, *lse_at) if packed else (batch, group)],
            }
            if has_bias:
                part["dbias"] = tensors["dbias"][per_key if dense_bias is None else dense]
            largest = max(
                largest,
                _one_head(
                    part,
                    query[(*rows, group)].transpose(0, 1),
                    key[(*keys, g)],
                    value[(*keys, g)],
                    dout[(*rows, group)].transpose(0, 1),
                    bias[per_key] if dense_bias is None else dense_bias[dense].double(),
                    None if dense_mask is None else dense_mask[dense],
                    dlse[(group, *lse_at) if packed else (batch, group)],
                    None if expiry is None else expiry[per_key].long(),
                    problem.scale,
                    problem.causal,
                    problem.query.dtype == torch.float16,
                ),
            )
    dbias_dtype = accumulation(problem.query.dtype)
    if dense_bias is not None:
        dbias_dtype = problem.bias.dtype
        tensors["dbias"] = tensors["dbias"].map(lambda part: _reduced(problem, part))
    return Expected(tensors, largest, expiry, dbias_dtype)


def _shared_by_groups(problem: Problem, dense: torch.Tensor) -> bool:
    heads_q, heads_kv = problem.query.shape[2], problem.key.shape[2]
    return dense.shape[1] == heads_kv not in (1, heads_q)


def _expanded(problem: Problem, dense: torch.Tensor) -> torch.Tensor:
    """A mask or dense bias, [B, H, Sq, Sk]."""
    batch, seqlen_q, heads_q, _ = problem.query.shape
    dense = dense.detach().cpu()
    if _shared_by_groups(problem, dense):
        dense = dense.repeat_interleave(heads_q // dense.shape[1], 1)
    return dense.expand(batch, heads_q, seqlen_q, problem.key.shape[1])


def _reduced(problem: Problem, part: torch.Tensor) -> torch.Tensor:
    """Summed over what shares the problem's dense bias."""
    if _shared_by_groups(problem, problem.bias):
        part = part.unflatten(1, (problem.bias.shape[1], -1)).sum(2)
    return part.sum_to_size(problem.bias.shape)


def _sequences(problem: Problem):
    """Index of query rows, key rows, lse columns and bias rows of every sequence, and its number."""
    if problem.cu_seqlens_q is None:
        for b in range(problem.query.shape[0]):
            yield (b, slice(None)), (b, slice(None)), None, None, b
        return
    starts_q, starts_k = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    for s in range(len(starts_q) - 1):
        q, k = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
        yield (q,), (k,), (q,), (k,), s


def _one_head(part, query, key, value, dout, bias, mask, dlse, expiry, scale, causal, is_float16) -> float:
    """One sequence and one key/value head. query, dout [group, Sq, D]; key, value [Sk, D]; dlse [group, Sq];
    bias [Sk] or [group, Sq, Sk]; mask None or [group, Sq, Sk]. Adds into part; returns the largest logit."""
    (group, seqlen_q, _), seqlen_k = query.shape, key.shape[0]
    if seqlen_q == 0:
        return 0.0
    position = (
        torch.arange(seqlen_q) + seqlen_k - seqlen_q if causal else torch.full((seqlen_q,), seqlen_k - 1)
    )
    born, dies = torch.arange(seqlen_k), torch.full((seqlen_k,), seqlen_k) if expiry is None else expiry
    if not causal:
        born = torch.zeros_like(born)
    first = int(position.min())
    # What no row sees may hold anything; it is left out before 0 * NaN can happen.
    unseen = born.clamp(min=first) >= dies.clamp(max=seqlen_k)
    if bias.dim() == 1:
        unseen |= bias == -torch.inf
    if mask is not None or bias.dim() > 1:
        allowed = (born <= position[:, None]) & (position[:, None] < dies)
        if mask is not None:
            allowed = allowed & mask
        unseen |= ~(allowed & (bias != -torch.inf)).flatten(0, -2).any(0)
    key, value = key.masked_fill(unseen[:, None], 0), value.masked_fill(unseen[:, None], 0)
    bias, dies = bias.masked_fill(unseen, 0), dies.masked_fill(unseen, -1)
    step = max(1, CHUNK // max(1, group * seqlen_k))
    largest = 0.0
    for start in range(0, seqlen_q, step):
        rows = slice(start, min(start + step, seqlen_q))
        at = position[rows][:, None]
        reach = int(position[rows].max()) + 1 if causal else seqlen_k  # later keys are invisible to the chunk
        sees = (born[:reach] <= at) & (at < dies[:reach])
        if mask is not None:
            sees = sees & mask[:, rows, :reach]
        offset = bias[..., :reach] if bias.dim() == 1 else bias[:, rows, :reach]
        logits = scale * (query[:, rows] @ key[:reach].T) + offset
        sees = sees & (offset > -torch.inf)
        products = abs(scale) * (query[:, rows].abs() @ key[:reach].abs().T)
        if sees.any():
            largest = max(
                largest, float(torch.maximum(logits.abs(), products - 8).masked_fill(~sees, 0).max())
            )
        _chunk(
            part,
            rows,
            reach,
            logits.masked_fill(~sees, -torch.inf),
            products,
            query[:, rows],
            key[:reach],
            value[:reach],
            dout[:, rows],
            dlse[:, rows],
            scale,
            is_float16,
        )
    return largest


def _chunk(part, rows, reach, logits, products, query, key, value, dout, dlse, scale, is_float16) -> None:
    """[group, rows, reach] matrices of one chunk, and what they add to every tensor."""
    nothing = logits.new_full((*logits.shape[:2], 1), -torch.inf)
    top = logits.max(dim=-1, keepdim=True).values if reach else nothing
    weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    P = weights / total.masked_fill(total == 0, 1)
    P2, key2, value2, query2, dout2 = P * P, key * key, value * value, query * query, dout * dout
    out, out_matrix = P @ value, P2 @ value2
    # Empty rows have P = 0: they add nothing below, whatever their dout and dlse.
    D = (dout * out).sum(-1, keepdim=True)
    dS = P * (dout @ value.T - D + dlse[..., None])
    dS2 = dS * dS
    e = 8 * FLOAT32 * P * (dout.abs() @ value.abs().T + D.abs() + dlse[..., None].abs())
    e2 = e * e
    delta_matrix = (dout2 * out_matrix).sum(-1, keepdim=True)
    delta_output = (dout2 * out * out).sum(-1, keepdim=True)
    s, s2 = scale, scale * scale
    mean_key2 = (P @ key) ** 2

    def by_row(answer, **parts):  # answer [rows, group, D]
        for name, term in parts.items():
            getattr(answer, name)[rows] = term.transpose(0, 1)

    def by_key(answer, **parts):  # answer [Sk, D] or [Sk]
        for name, term in parts.items():
            getattr(answer, name)[:reach] += term.sum(0)

    by_row(part["out"], value=out, terms=P @ value.abs(), matrix=out_matrix)
    part["lse"].value[:, rows] = (torch.log(total) + top)[..., 0]
    part["lse"].terms[:, rows] = (P * products).sum(-1)
    by_row(
        part["dq"],
        value=s * (dS @ key),
        terms=abs(s) * (dS.abs() @ key.abs()),
        exact=s2 * (e2 @ key2),
        matrix=s2 * (dS2 @ key2 + delta_matrix * mean_key2),
        output=s2 * delta_output * mean_key2,
    )
    by_key(
        part["dk"],
        value=s * (dS.mT @ query),
        terms=abs(s) * (dS.abs().mT @ query.abs()),
        exact=s2 * (e2.mT @ query2),
        matrix=s2 * ((dS2 + P2 * delta_matrix).mT @ query2),
        output=s2 * ((P2 * delta_output).mT @ query2),
    )
    by_key(part["dv"], value=P.mT @ dout, terms=P.mT @ dout.abs(), matrix=P2.mT @ dout2)
    if is_float16:
        # The square of the largest error, in units of FLOAT16_SUBNORMAL: what is smaller may vanish, no more.
        small_P, small_dS = ((x / FLOAT16_SUBNORMAL).clamp(-1, 1) ** 2 for x in (P, dS))
        by_row(part["out"], subnormal=small_P @ value2)
        by_row(part["dq"], subnormal=s2 * (small_dS @ key2))
        by_key(part["dk"], subnormal=s2 * (small_dS.mT @ query2))
        by_key(part["dv"], subnormal=small_P.mT @ dout2)
    if "dbias" not in part:
        return
    if part["dbias"].value.dim() == 3:  # dense
        terms = dict(value=dS, terms=dS.abs(), exact=e2, logit=dS2)
        terms |= dict(matrix=P2 * delta_matrix, output=P2 * delta_output)
        for name, term in terms.items():
            getattr(part["dbias"], name)[:, rows, :reach] = term
        return
    by_key(
        part["dbias"],
        value=dS.sum(1),
        terms=dS.abs().sum(1),
        exact=e2.sum(1),
        matrix=(P2 * delta_matrix).sum(1),
        output=(P2 * delta_output).sum(1),
        logit=dS2.sum(1),
    )
