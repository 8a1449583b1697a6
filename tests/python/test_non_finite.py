"""P5: how far a NaN or an infinity spreads that some row uses. Those that no row uses: test_bitwise.py."""

import pytest
import torch

import tiers
from cases import Case, make
from counters import count
from oracle import expected

SQ, SK = 90, 150


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["query", "key", "value", "dout"])
def test_never_finite_and_wrong(kernel, which, junk, causal, dtype):
    """What depends on a NaN is NaN. What does not depend on the junk is within its bound, or not finite."""
    case = Case(seqlen_q=SQ, seqlen_k=SK, head_dim=24, keep_window=32, dtype=dtype, causal=causal)
    problem = make(case)
    answer = expected(problem)
    position = torch.arange(SQ) + SK - SQ if causal else torch.full((SQ,), SK - 1)
    seen = torch.stack([sees(position, dies, causal) for dies in answer.expiry[0]])  # [kv head, row, key]
    users = torch.zeros(SQ, 4, dtype=torch.bool)  # [row, head]: has the junk among its inputs
    poisoned = getattr(problem, which).clone()
    if which in ("query", "dout"):
        poisoned[0, 40, 2, 5] = junk
        users[40, 2] = True
    else:
        key = 80 + int(seen[1, :, 80:120].sum(0).argmax())
        poisoned[0, key, 1, 5] = junk
        users[:, 2:] = seen[1, :, key, None]
        assert not (causal and users[:, 2].all())
    assert users.any()
    by_kv_head = users.unflatten(1, (2, 2)).any(2).T  # [kv head, row]
    keys = (seen & by_kv_head[..., None]).any(1)  # [kv head, key]: seen by a row that uses the junk
    depends = {"out": users[None, ..., None], "lse": users.T[None], "dbias": keys[None]}
    depends |= {"dq": depends["out"], "dk": keys.T[None, ..., None], "dv": keys.T[None, ..., None]}

    rule = tiers.rules(problem.query.dtype, answer.largest_logit, False)[0]
    results = kernel.run(problem.replace(**{which: poisoned}).to(kernel.device))
    for name, tensor in results.items():
        x, reference = tensor.cpu().double(), answer.tensors[name]
        near = (x - reference.value).abs() <= tiers.bound(name, reference, tensor.dtype, rule)
        wrong = ~(~x.isfinite() | near | depends[name])
        assert not wrong.any(), f"{name} is finite and wrong, first at {wrong.nonzero()[0].tolist()}"
        # The logits of a row with a NaN in query or key are NaN, and so is all that comes of them.
        if junk != junk and which in ("query", "key"):
            assert x[depends[name].expand(x.shape)].isnan().all(), f"{name} depends on a NaN and is not NaN"
        count("tier B", x.numel())


def sees(position, dies, causal):
    """[row, key]"""
    born = torch.arange(SK) if causal else torch.zeros(SK)
    return (born <= position[:, None]) & (position[:, None] < dies)
