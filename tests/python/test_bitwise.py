"""Equal bits: P2, P3, P5 and causality. What must not reach a result must not move its last bit either."""

import dataclasses
import itertools

import flash_dmattn
import pytest
import torch

from cases import Case, make
from counters import count
from kernels import bit_for_bit
from narrowing import fit

BASE = dict(
    batch=2, seqlen_q=190, seqlen_k=190, heads_q=4, heads_kv=2, head_dim=32, keep_window=32, dlse=True
)
CASES = [
    Case(**BASE),
    Case(**BASE, dtype="bf16"),
    Case(**BASE, dtype="f64"),
    Case(**BASE, dtype="f16", score="two_values"),
    Case(**(BASE | dict(keep_window=500, seqlen_q=70))),
    Case(**(BASE | dict(seqlen_q=130, bias="separate"))),
    Case(**(BASE | dict(keep_window=None, bias="separate"))),
    Case(**(BASE | dict(batch=1, seqlen_q=2300, seqlen_k=2300, keep_window=64, heads_q=2, heads_kv=1))),
]
EDITS = Case(**(BASE | dict(num_sinks=3, local_window=9, score="minus_inf")))


def assert_same(results, wanted, what):
    for name in wanted:
        if name in results:
            assert bit_for_bit(results[name], wanted[name]), f"{what}: {name} has other bits"
            count("bitwise")


def with_ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def cut(problem, rows=slice(None), keys=slice(None), batch=slice(None)):
    """A part of an unpacked problem's tokens and batch entries."""
    axes = {
        "query": (batch, rows),
        "dout": (batch, rows),
        "key": (batch, keys),
        "value": (batch, keys),
        "bias": (batch, slice(None), keys),
        "score": (batch, slice(None), keys),
        "dlse": (batch, slice(None), rows),
    }
    parts = {
        name: getattr(problem, name)[at] for name, at in axes.items() if getattr(problem, name) is not None
    }
    return problem.replace(**parts)


@with_ids([*CASES, EDITS])
def test_repeated_runs(kernel, case):
    problem = make(case).to(kernel.device)
    first = kernel.run(problem)
    for _ in range(3):
        ballast = [torch.full((1 << 18,), torch.nan) for _ in range(8)]  # other addresses, dirty memory
        assert_same(kernel.run(problem), first, "repeated")
        del ballast


@with_ids(CASES)
def test_numbers_of_threads(kernel, case):
    problem = make(case).to(kernel.device)
    torch.set_num_threads(1)
    alone = kernel.run(problem)
    expiry = kernel.select(problem)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(kernel.run(problem), alone, f"{threads} threads")
        assert expiry is None or torch.equal(kernel.select(problem), expiry)


@with_ids([case for case in CASES if case.seqlen_q == case.seqlen_k] + [EDITS])
def test_a_later_token_changes_nothing_before_it(kernel, case):
    problem = make(case).to(kernel.device)
    before = kernel.run(problem)
    other = make(dataclasses.replace(case, seed=99)).to(kernel.device)
    for first in (1, case.seqlen_k // 2, case.seqlen_k - 1):
        changed = {}
        for name, tensor in vars(cut(problem)).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            axis = 2 if name in ("bias", "score", "dlse") else 1
            changed[name] = torch.cat(
                [
                    tensor.narrow(axis, 0, first),
                    3 * getattr(other, name).narrow(axis, first, tensor.shape[axis] - first),
                ],
                axis,
            )
        after = kernel.run(problem.replace(**changed))
        rows = {
            "out": after["out"][:, :first],
            "lse": after["lse"][..., :first],
            "dq": after["dq"][:, :first],
        }
        assert_same(
            rows,
            {
                "out": before["out"][:, :first],
                "lse": before["lse"][..., :first],
                "dq": before["dq"][:, :first],
            },
            f"tokens from {first} on changed",
        )


@with_ids([case for case in CASES if case.seqlen_q == case.seqlen_k] + [EDITS])
def test_appended_tokens_change_nothing(kernel, case):
    problem = make(case).to(kernel.device)
    whole = kernel.run(problem)
    for length in (1, case.keep_window or 7, case.seqlen_k // 2 + 3, case.seqlen_k - 1):
        length = min(length, case.seqlen_k)
        part = kernel.run(cut(problem, slice(0, length), slice(0, length)))
        assert_same(
            {name: part[name] for name in ("out", "lse", "dq")},
            {
                "out": whole["out"][:, :length],
                "lse": whole["lse"][..., :length],
                "dq": whole["dq"][:, :length],
            },
            f"the first {length} tokens alone",
        )


@with_ids(CASES)
def test_a_batch_entry_is_what_it_is_alone(kernel, case):
    problem = make(case).to(kernel.device)
    together = kernel.run(problem)
    expiry = kernel.select(problem)
    for b in range(case.batch):
        entry = cut(problem, batch=slice(b, b + 1))
        assert_same(
            kernel.run(entry),
            {name: tensor[b : b + 1] for name, tensor in together.items()},
            f"entry {b} alone",
        )
        assert expiry is None or torch.equal(kernel.select(entry), expiry[b : b + 1])


@with_ids([Case(**(BASE | dict(batch=5, dtype=dtype))) for dtype in ("f32", "bf16")])
def test_permuted_batch(kernel, case):
    problem = make(case).to(kernel.device)
    order = torch.tensor([3, 0, 4, 2, 1], device=kernel.device)
    permuted = problem.map(lambda tensor: tensor[order])
    wanted = {name: tensor[order] for name, tensor in kernel.run(problem).items()}
    assert_same(kernel.run(permuted), wanted, "permuted batch")


@with_ids(
    [
        Case(**(BASE | dict(heads_q=heads_q, heads_kv=3, dtype=dtype)))
        for dtype in ("f32", "bf16")
        for heads_q in (3, 9)
    ]
)
def test_permuted_heads(kernel, case):
    """Key/value heads in another order, each with its group of query heads."""
    problem = make(case).to(kernel.device)
    order_kv = torch.tensor([2, 0, 1], device=kernel.device)
    group = case.heads_q // 3
    order_q = (order_kv[:, None] * group + torch.arange(group, device=kernel.device)).flatten()
    axis = {"query": 2, "dout": 2, "key": 2, "value": 2, "bias": 1, "score": 1, "dlse": 1}
    permute = {
        name: getattr(problem, name).index_select(
            at, order_q if name in ("query", "dout", "dlse") else order_kv
        )
        for name, at in axis.items()
    }
    axis = {
        "out": (2, order_q),
        "lse": (1, order_q),
        "dq": (2, order_q),
        "dk": (2, order_kv),
        "dv": (2, order_kv),
        "dbias": (1, order_kv),
    }
    wanted = {name: tensor.index_select(*axis[name]) for name, tensor in kernel.run(problem).items()}
    assert_same(kernel.run(problem.replace(**permute)), wanted, "permuted heads")


@with_ids(
    [
        Case(lengths=((40, 70), (0, 3), (90, 90), (1, 1)), heads_q=4, heads_kv=2, dtype=dtype, dlse=True)
        for dtype in ("f64", "f32", "bf16", "f16")
    ]
)
def test_a_packed_sequence_is_what_it_is_alone(kernel, case):
    problem = make(case).to(kernel.device)
    together = kernel.run(problem)
    for s in range(len(case.lengths)):
        q, k = (slice(*bounds[s : s + 2].tolist()) for bounds in (problem.cu_seqlens_q, problem.cu_seqlens_k))
        single = [torch.tensor([0, n], dtype=torch.int32, device=kernel.device) for n in case.lengths[s]]
        alone = kernel.run(
            problem.replace(
                query=problem.query[q],
                key=problem.key[k],
                value=problem.value[k],
                dout=problem.dout[q],
                bias=problem.bias[k],
                score=problem.score[k],
                dlse=problem.dlse[:, q],
                cu_seqlens_q=single[0],
                cu_seqlens_k=single[1],
            )
        )
        wanted = {
            "out": together["out"][q],
            "lse": together["lse"][:, q],
            "dq": together["dq"][q],
            "dk": together["dk"][k],
            "dv": together["dv"][k],
            "dbias": together["dbias"][k],
        }
        assert_same(alone, wanted, f"sequence {s} alone")


@with_ids(
    [
        Case(**BASE, dtype=dtype, score=score, causal=causal)
        for dtype in ("f64", "f32", "bf16", "f16")
        for score, causal in (("falling", True), ("minus_inf", True), ("nan", False))
    ]
    + [Case(**(BASE | dict(seqlen_q=1, seqlen_k=300)))]
)
def test_keys_that_no_row_sees_may_hold_anything(kernel, case):
    problem = make(case).to(kernel.device)
    expiry = kernel.select(problem)
    first = case.seqlen_k - case.seqlen_q if case.causal else case.seqlen_k - 1
    born = torch.arange(case.seqlen_k, device=kernel.device).clamp(min=first) if case.causal else first
    unseen = born >= expiry
    assert unseen.any() and not unseen.all()
    before = kernel.run(problem)
    rows = unseen.transpose(1, 2)[..., None]
    for junk in (torch.nan, torch.inf, -torch.inf):
        # The score that selects stays; what is attended to is another bias, with junk where nobody looks.
        after = kernel.run(
            problem.replace(
                key=problem.key.masked_fill(rows, junk),
                value=problem.value.masked_fill(rows, junk),
                bias=problem.bias.masked_fill(unseen, junk),
                score=None,
                fixed_expiry=expiry,
            )
        )
        assert_same(after, before, f"unseen keys are {junk}")
    for name in ("dk", "dv"):
        assert (before[name].masked_select(rows) == 0).all(), name
    assert (before["dbias"][unseen] == 0).all()


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
def test_keys_that_a_bias_disables_may_hold_anything(kernel, dtype, causal, windowed):
    """A bias of -inf disables its key even where expiry shows it."""
    window = dict(keep_window=32 if windowed else None, dtype=dtype, causal=causal, bias="separate")
    problem = make(Case(**(BASE | window))).to(kernel.device)
    disabled = (
        torch.rand(problem.bias.shape, generator=torch.Generator().manual_seed(1)).to(kernel.device) < 0.3
    )
    expiry = None if problem.score is None else kernel.select(problem)
    problem = problem.replace(
        bias=problem.bias.masked_fill(disabled, -torch.inf), score=None, fixed_expiry=expiry
    )
    before = kernel.run(problem)
    rows = disabled.transpose(1, 2)[..., None]
    for junk in (torch.nan, torch.inf):
        key, value = problem.key.masked_fill(rows, junk), problem.value.masked_fill(rows, junk)
        assert_same(kernel.run(problem.replace(key=key, value=value)), before, f"disabled keys are {junk}")
    assert (before["dbias"][disabled] == 0).all()
    for name in ("dk", "dv"):
        assert (before[name].masked_select(rows) == 0).all(), name


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_subset_of_gradients(kernel, dtype):
    problem = make(Case(**BASE, dtype=dtype)).to(kernel.device)
    whole = kernel.run(problem)
    expiry = kernel.select(problem)
    for needs in itertools.product((True, False), repeat=4):
        grads = kernel.backward(problem, expiry, whole["out"], whole["lse"], needs)
        assert set(grads) == {name for name, need in zip(("dq", "dk", "dv", "dbias"), needs) if need}
        assert_same(grads, {name: whole[name] for name in grads}, f"gradients {needs}")


def test_every_subset_of_requires_grad(kernel):
    problem = make(fit(Case(**(BASE | dict(batch=1))), kernel)).to(kernel.device)
    whole = kernel.run(problem)
    for needs in itertools.product((True, False), repeat=4):
        leaves = [
            tensor.detach().clone().requires_grad_(need)
            for tensor, need in zip((problem.query, problem.key, problem.value, problem.bias), needs)
        ]
        out, lse = flash_dmattn.flash_dmattn_func(
            *leaves[:3], attn_bias=leaves[3], is_causal=True, keep_window_size=32, return_lse=True
        )
        assert out.requires_grad == lse.requires_grad == any(needs)
        assert_same(
            {"out": out, "lse": lse}, {"out": whole["out"], "lse": whole["lse"]}, f"requires_grad {needs}"
        )
        if any(needs):
            torch.autograd.backward([out, lse], [problem.dout, problem.dlse])
        for name, leaf, need in zip(("dq", "dk", "dv", "dbias"), leaves, needs):
            assert (leaf.grad is not None) == need
            if need:
                assert_same({name: leaf.grad}, {name: whole[name]}, f"requires_grad {needs}")
