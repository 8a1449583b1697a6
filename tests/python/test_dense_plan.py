"""The plan of masks and dense biases: one bit per pair of row and key, the same results with it as without.

On the GPU and in the emulator alone: the CPU kernels take no plan.
"""

import pytest
import torch

from cases import make
from counters import count
from test_bitwise import assert_same
from test_dense import FORMS, case_of, visible_pairs


@pytest.fixture(autouse=True)
def _cuda_kernels_only(kernel):
    if not kernel.name.startswith("cuda"):
        pytest.skip("this kernel takes no plan")


def plan_of(kernel, problem, expiry):
    return kernel.ops.plan(
        expiry, None, problem.bias, None, None, problem.query.shape[1], 0, problem.causal, problem.mask
    )


CASES = [
    *(case_of(mask=form, dtype="bf16", causal=len(form) % 4 < 2) for form in FORMS),
    *(case_of(dense_bias=form, dtype="f16", causal=len(form) % 4 >= 2) for form in FORMS),
    case_of(mask="1 Hkv Sq Sk", dense_bias="B H Sq Sk", dtype="bf16"),
    case_of(mask="1 1 Sq Sk", bias="score", keep_window=40, dtype="bf16"),
    case_of(mask="1 H 1 Sk", bias="separate", dtype="f16", heads_kv=1),
    case_of(mask="B H Sq Sk", dense_bias="1 Hkv 1 Sk", dtype="bf16", heads_q=6, heads_kv=3, dlse=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_its_bits_and_the_results_with_it(kernel, case):
    problem = make(case).to(kernel.device)
    expiry = kernel.select(problem)
    plan = plan_of(kernel, problem, expiry)
    sees = visible_pairs(problem, expiry)
    for axis in (0, 1):  # sequences, and heads, that see the same share their bits
        tensors = [t for t in (problem.mask, problem.bias, expiry) if t is not None]
        if all(t.shape[axis] == 1 for t in tensors):
            sees = sees.narrow(axis, 0, 1)
    if not any(t.shape[1] == case.heads_q for t in tensors if t.dim() == 4) and sees.shape[1] > 1:
        sees = sees[:, :: case.heads_q // case.heads_kv]
    blocks = -(-case.seqlen_k // 64)
    bits = torch.nn.functional.pad(sees.cpu(), (0, 64 * blocks - case.seqlen_k)).unflatten(-1, (blocks, 64))
    wanted = (bits.long() << torch.arange(64)).sum(-1).transpose(2, 3).flatten()  # [B, H, blocks, Sq]
    aligned = -plan.data_ptr() % 64 // 4
    found = plan[aligned : aligned + 2 * wanted.numel()].cpu().contiguous().view(torch.int64)
    assert plan.numel() - 2 * wanted.numel() in range(33)
    assert torch.equal(found, wanted)
    count("plan", wanted.numel())

    without = kernel.run(problem)
    score = problem.ranked_score()
    inputs = (problem.query, problem.key, problem.value, problem.bias, problem.mask, expiry, score, plan)
    options = (None, None, case.keep_window if score is not None else 0, problem.scale, problem.causal)
    out, lse = kernel.ops.forward(*inputs, *options)
    needs = (True, True, True, problem.bias is not None)
    grads = kernel.ops.backward(problem.dout, problem.dlse, *inputs, out, lse, *options, *needs)
    results = dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *grads)))
    assert_same({name: results[name] for name in without}, without, "with a plan")


def test_refusals(kernel):
    problem = make(case_of(mask="B H Sq Sk", dtype="bf16")).to(kernel.device)
    plan = plan_of(kernel, problem, None)
    inputs = (problem.query, problem.key, problem.value, None, problem.mask, None, None)
    with pytest.raises(RuntimeError, match=r"plan: takes the \d+ elements that plan makes of these arguments"):
        kernel.ops.forward(*inputs, plan[:-32], None, None, 0, problem.scale, problem.causal)

    def refused(expiry, bias, mask, cu_seqlens=None, num_queries=70):
        with pytest.raises(RuntimeError, match="flash_dmattn::plan") as caught:
            kernel.ops.plan(expiry, None, bias, cu_seqlens, cu_seqlens, num_queries, 0, True, mask)
        return str(caught.value)

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=kernel.device)

    mask = zeros(2, 4, 70, 130, dtype=torch.bool)
    assert "got none of expiry, bias and mask" in refused(None, None, None)
    assert "expected [B, H, Sq, Sk] with B = 2 or 1" in refused(None, zeros(3, 4, 70, 130), mask)
    assert "Sq = 60 or 1" in refused(None, None, mask, num_queries=60)
    assert "Sk = 130" in refused(None, zeros(2, 4, 70, 131), mask)
    assert "a multiple of the number of key/value heads" in refused(None, zeros(2, 3, 70, 130), mask)
    assert "expected [B, Hkv, Sk]" in refused(zeros(2, 2, 129, dtype=torch.int32), None, mask)
    assert "packed sequences take no mask" in refused(None, None, mask, zeros(3, dtype=torch.int32))
    assert "num_queries: got 131, expected 0 to 130" in refused(None, None, mask[:, :, :1], num_queries=131)
