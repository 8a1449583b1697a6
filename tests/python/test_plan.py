"""The plan, entry for entry, against plan_model.py; the order that it promises; its entries and its waste.

On the GPU and in the emulator alone: the CPU kernels have a plan of their own.
"""

import itertools

import numpy as np
import pytest
import torch

import plan_model
import ranking
from counters import count, note

INT32_MAX = 2**31 - 1
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(autouse=True)
def _cuda_kernels_only(kernel):
    if not kernel.name.startswith("cuda"):
        pytest.skip("this kernel reads no plan")


def normal(n, generator):
    return torch.randn(n, generator=generator)


# One number per key, as models make them.
PROCESSES = {
    "iid": lambda n, w, g: normal(n, g),
    "drift": lambda n, w, g: normal(n, g) + 30 * torch.arange(n) / n,
    "sliding": lambda n, w, g: torch.arange(n).float(),
    "falling": lambda n, w, g: -torch.arange(n).float(),
    "equal": lambda n, w, g: torch.full((n,), 0.5),
    "ties": lambda n, w, g: torch.nn.functional.softplus(normal(n, g)).exp().bfloat16().float(),
    "minus_inf": lambda n, w, g: normal(n, g).masked_fill(torch.rand(n, generator=g) < 0.4, -torch.inf),
    "nan": lambda n, w, g: normal(n, g).masked_fill(torch.rand(n, generator=g) < 0.2, torch.nan),
    "zeros": lambda n, w, g: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "half_immortal": lambda n, w, g: torch.arange(n).float() + 1e6 * (torch.arange(n) < w // 2),
}


def draw(process, shape, keep_window, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = [PROCESSES[process](shape[-1], keep_window, generator) for _ in range(int(np.prod(shape[:-1])))]
    return torch.stack(heads).reshape(shape).to(dtype) if heads else torch.empty(shape, dtype=dtype)


def draw_bias(shape, seed=7):
    """With disabled keys, and NaN, which disables none."""
    generator = torch.Generator().manual_seed(seed)
    bias, luck = (
        torch.randn(shape, generator=generator),
        torch.rand(shape, generator=generator),
    )
    return bias.masked_fill(luck < 0.2, -torch.inf).masked_fill(luck > 0.98, torch.nan)


def build(
    kernel,
    expiry,
    score=None,
    bias=None,
    num_queries=0,
    keep_window=0,
    causal=True,
    cu_q=None,
    cu_k=None,
):
    tensors = [None if t is None else t.to(kernel.device) for t in (expiry, score, bias, cu_q, cu_k)]
    return kernel.ops.plan(*tensors, num_queries, keep_window, causal)


def head_slices(expiry, bias, num_queries, cu_q, cu_k):
    """(sequence, head, first key, keys, rows, index of the head's vectors)."""
    shape = (expiry if expiry is not None else bias).shape
    for sequence in range(shape[0] if cu_k is None else len(cu_k) - 1):
        for head in range(shape[1]):
            if cu_k is None:
                yield (
                    sequence,
                    head,
                    sequence * shape[2],
                    shape[2],
                    num_queries,
                    (sequence, head),
                )
            else:
                (begin, end), rows = (
                    cu_k[sequence : sequence + 2].tolist(),
                    cu_q[sequence : sequence + 2].diff().item(),
                )
                yield (
                    sequence,
                    head,
                    begin,
                    end - begin,
                    rows,
                    (slice(begin, end), head),
                )


def assert_equals_model(
    kernel,
    expiry,
    score=None,
    bias=None,
    num_queries=None,
    keep_window=0,
    causal=True,
    cu_q=None,
    cu_k=None,
):
    """Returns the model's segments of every head."""
    shape = (expiry if expiry is not None else bias).shape
    packed = cu_k is not None
    seqlen_k = shape[0] if packed else shape[2]
    num_queries = seqlen_k if num_queries is None else num_queries
    sequences = len(cu_k) - 1 if packed else shape[0]
    plan = build(kernel, expiry, score, bias, num_queries, keep_window, causal, cu_q, cu_k)
    bound = plan_model.length_bound(seqlen_k, keep_window, expiry is not None, causal)
    total_k = seqlen_k if packed else sequences * seqlen_k
    memory = plan_model.PlanMemory(plan, total_k, sequences, shape[1], bias is not None, bound)
    assert plan.dtype == torch.int32 and memory.end <= plan.numel() <= memory.end + 16
    vectors = [
        None if t is None else t.float().numpy() if t.is_floating_point() else t.numpy()
        for t in (expiry, score, bias)
    ]
    found = []
    for sequence, head, begin, keys, rows, index in head_slices(expiry, bias, num_queries, cu_q, cu_k):
        own = [None if v is None else v[index] for v in vectors]
        length, wanted = plan_model.plan_of_head(*own, rows, keys, bound, causal)
        actual_length, actual = memory.head(head, sequence, begin, keys, causal) if keys else (length, {})
        where = (
            f"sequence {sequence}, head {head}: {keys} keys, {rows} rows, w={keep_window}, causal={causal}"
        )
        assert actual_length == length, where
        assert sorted(actual) == [t for t in sorted(wanted) if len(wanted[t].keys)], where
        for segment, lists in actual.items():
            for name in ("keys", "expiry", "bias", "hulls"):
                ours, theirs = getattr(lists, name), getattr(wanted[segment], name)
                same = ours is theirs is None or np.array_equal(ours, theirs, equal_nan=name == "bias")
                assert same, f"{where}: {name} of segment {segment} differ: {ours}, wanted {theirs}"
        count("plan", sum(len(lists.keys) for lists in wanted.values()))
        found.append((length, wanted))
    return found


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("keep_window", [1, 63, 1000, 2048, 3000, 4097])
def test_selected_keys(kernel, process, keep_window):
    score = draw(process, (1, 2, 9000), keep_window)
    expiry = ranking.expiry(score, keep_window, True)
    assert_equals_model(kernel, expiry, score, keep_window=keep_window)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 2047, 2048, 2049, 4096, 4097, 6200])
def test_lengths(kernel, length):
    for keep_window in (1, 64, length, length + 1, INT32_MAX):
        score = draw("iid", (1, 1, length), keep_window)
        expiry = ranking.expiry(score, keep_window, True)
        assert_equals_model(kernel, expiry, score, keep_window=keep_window)
        assert_equals_model(kernel, expiry, score)
        assert_equals_model(
            kernel,
            ranking.expiry(score, keep_window, False),
            score,
            keep_window=keep_window,
            causal=False,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("process", ["iid", "ties", "nan", "zeros"])
def test_score_types(kernel, process, dtype):
    score = draw(process, (2, 2, 5000), 700, DTYPES[dtype])
    expiry = ranking.expiry(score, 700, True)
    assert_equals_model(kernel, expiry, score, keep_window=700)
    assert_equals_model(kernel, expiry, score)
    assert_equals_model(kernel, expiry, keep_window=700)


@pytest.mark.parametrize("num_queries", [0, 1, 100, 2047, 2048, 2049, 4999, 8999, 9000])
@pytest.mark.parametrize("process", ["iid", "sliding", "half_immortal"])
def test_fewer_rows_than_keys(kernel, process, num_queries):
    for keep_window in (500, 4097):
        score = draw(process, (1, 2, 9000), keep_window)
        expiry = ranking.expiry(score, keep_window, True)
        assert_equals_model(kernel, expiry, score, num_queries=num_queries, keep_window=keep_window)
        assert_equals_model(kernel, expiry, score, draw_bias(score.shape), num_queries=num_queries)


@pytest.mark.parametrize("n", [10_000, 40_000])
@pytest.mark.parametrize("keep_window", [0, 1, 600, 2500, 5000])
def test_any_expiry_is_safe(kernel, n, keep_window):
    """Far more keys alive than a window allows, and values that no selection makes."""
    generator = torch.Generator().manual_seed(keep_window)
    key = torch.arange(n)
    forms = {
        "random": torch.randint(0, n + 1, (n,), generator=generator),
        "wild": torch.randint(-(2**31), 2**31, (n,), generator=generator),
        "all alive": torch.full((n,), INT32_MAX),
        "none": torch.full((n,), -1),
        "short lives": key + torch.randint(0, 50, (n,), generator=generator),
        "early keys live": torch.where(key < 5000, n, 0),
        "one dies at a time": (key + 3000).clamp(max=n),
    }
    score = draw("iid", (1, 1, n), 1)
    for expiry, scored, num_queries in itertools.product(forms.values(), (None, score), (n, 1500)):
        expiry = expiry.int()[None, None]
        assert_equals_model(kernel, expiry, scored, num_queries=num_queries, keep_window=keep_window)


@pytest.mark.parametrize("num_sinks, local_window", [(4, 0), (0, 300), (100, 2100), (3000, 0)])
def test_sinks_and_local_windows(kernel, num_sinks, local_window):
    score = draw("iid", (1, 2, 9000), 1000)
    expiry = ranking.expiry(score, 1000, True, num_sinks, local_window)
    assert_equals_model(kernel, expiry, score)
    assert_equals_model(kernel, expiry, score, keep_window=1000)


@pytest.mark.parametrize("causal", [True, False])
def test_disabled_keys(kernel, causal):
    score = draw("iid", (2, 2, 5000), 1000)
    bias = draw_bias(score.shape)
    expiry = ranking.expiry(score, 1000, causal)
    every = torch.full_like(bias, -torch.inf)
    for disabled in (bias, every):
        assert_equals_model(kernel, expiry, score, disabled, keep_window=1000, causal=causal)
        assert_equals_model(kernel, expiry, score, disabled, causal=causal)
        assert_equals_model(kernel, None, None, disabled, causal=causal)
        assert_equals_model(kernel, None, None, disabled, num_queries=77, causal=causal)


@pytest.mark.parametrize(
    "lengths",
    [
        (5, 0, 2130, 1, 64),
        (0, 0, 9),
        (9, 0, 0),
        (0,),
        (),
        (4096, 2048, 1, 0, 6000, 2047),
        (1, 30_000, 0, 5000),
    ],
)
def test_packed_sequences(kernel, lengths):
    cu_k = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    rows = [(n + 1) // 2 if index % 2 else n for index, n in enumerate(lengths)]
    total = sum(lengths)
    score = torch.cat(
        [draw("ties", (3, n), 100, seed=n) for n in lengths] or [torch.empty(3, 0)], 1
    ).T.contiguous()
    for cu_q in (
        cu_k,
        torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32),
    ):
        for keep_window, causal in ((100, True), (2500, True), (100, False)):
            expiry = ranking.expiry(score, keep_window, causal, cu_seqlens=cu_k)
            for bias in (None, draw_bias((total, 3))):
                assert_equals_model(kernel, expiry, score, bias, 0, keep_window, causal, cu_q, cu_k)
                assert_equals_model(kernel, expiry, score, bias, 0, 0, causal, cu_q, cu_k)
        assert_equals_model(kernel, None, None, draw_bias((total, 3)), 0, 0, True, cu_q, cu_k)


def test_packed_sequences_with_more_rows_than_keys(kernel):
    """No caller may, and the kernels cannot tell before they run."""
    cu_k = torch.tensor([0, 100, 100, 3000], dtype=torch.int32)
    cu_q = torch.tensor([0, 3000, 3100, 3200], dtype=torch.int32)
    score = draw("iid", (2, 3000), 50).T.contiguous()
    expiry = ranking.expiry(score, 50, True, cu_seqlens=cu_k)
    for keep_window in (50, 0):
        assert_equals_model(kernel, expiry, score, None, 0, keep_window, True, cu_q, cu_k)


@pytest.mark.parametrize(
    "wrong",
    [
        (-5, 100, 50, 4000),
        (4000, 3000, 2000, 0),
        (2**31 - 1, -(2**31), 7, 9),
        (1, 2, 3, 4),
    ],
)
def test_wrong_offsets_do_no_harm(kernel, wrong):
    """Only that the call returns: what it writes out of bounds, sanitizers see."""
    cu = torch.tensor(wrong, dtype=torch.int32)
    score = draw("iid", (2, 3000), 50).T.contiguous()
    expiry = torch.full((3000, 2), 3000, dtype=torch.int32)
    for keep_window in (50, 0):
        assert (
            build(
                kernel,
                expiry,
                score,
                draw_bias((3000, 2)),
                0,
                keep_window,
                True,
                cu,
                cu,
            ).numel()
            > 0
        )


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty_tensors(kernel, shape):
    expiry = torch.empty(shape, dtype=torch.int32)
    for causal in (True, False):
        for keep_window in (4, 0):
            assert_equals_model(kernel, expiry, None, torch.empty(shape), 0, keep_window, causal)


def test_strides_do_not_matter(kernel):
    dense = draw("ties", (2, 3, 3000), 400)
    forms = {
        "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": lambda t: torch.stack([t, t + 1], -1).flatten(2)[..., ::2],
        "keys first": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "heads expanded": lambda t: t[:, :1].expand(-1, 5, -1),
        "offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view_as(t),
    }
    expiry, bias = ranking.expiry(dense, 400, True), draw_bias(dense.shape)
    for form, keep_window in itertools.product(forms.values(), (400, 0)):
        assert_equals_model(kernel, form(expiry), form(dense), form(bias), keep_window=keep_window)


@pytest.mark.parametrize("length, num_queries", [(70_000, 70_000), (140_000, 1), (140_000, 5000)])
def test_long_sequences(kernel, length, num_queries):
    score = draw("half_immortal", (1, 1, length), 1000)
    expiry = ranking.expiry(score, 1000, True)
    for keep_window in (1000, 0):
        assert_equals_model(kernel, expiry, score, num_queries=num_queries, keep_window=keep_window)


def test_more_than_a_million_keys(kernel):
    length = 1_060_000
    key = torch.arange(length)
    expiry = torch.where(key % 1000 == 7, length, key + 900).clamp(max=length).int()[None, None]
    score = draw("ties", (1, 1, length), 1)
    for keep_window in (2048, 0):
        assert_equals_model(kernel, expiry, score, num_queries=5000, keep_window=keep_window)


def test_lists_of_many_runs(kernel):
    """More old keys than one sort, and than one round of merging, takes."""
    score = draw("ties", (1, 1, 140_000), 1)
    assert_equals_model(
        kernel,
        ranking.expiry(score, 60_000, True),
        score,
        keep_window=60_000,
        num_queries=9000,
    )
    alive = torch.full(score.shape, INT32_MAX, dtype=torch.int32)
    assert_equals_model(kernel, alive, score, num_queries=5)
    assert_equals_model(kernel, alive, score, num_queries=5, keep_window=40_000)


def test_a_row_reads_its_keys_in_an_order_that_later_scores_do_not_change(kernel):
    generator = torch.Generator().manual_seed(5)
    length, keep_window = 6000, 700
    first = draw("iid", (1, 1, length), keep_window)
    for changed_from in (1, 2047, 2048, 3000, 5999):
        second = first.clone()
        second[..., changed_from:] = 3 * torch.randn(length - changed_from, generator=generator)
        orders = []
        for score in (first, second):
            plan = build(
                kernel,
                ranking.expiry(score, keep_window, True),
                score,
                None,
                length,
                keep_window,
            )
            _, segments = plan_model.PlanMemory(plan, length, 1, 1, False, 2048).head(0, 0, 0, length, True)
            rows = [r for r in range(max(0, changed_from - 40), changed_from)] + [changed_from // 2]
            lists = [segments[row // 2048] for row in rows]
            orders.append(
                [s.keys[(s.keys <= row) & (row < s.expiry)].tolist() for row, s in zip(rows, lists)]
            )
        assert orders[0] == orders[1]


def test_repeats_are_equal(kernel):
    score, bias = draw("iid", (2, 2, 9000), 1000), draw_bias((2, 2, 9000))
    expiry = ranking.expiry(score, 1000, True)
    for keep_window in (1000, 0):
        heads = []
        for _ in range(3):
            plan = build(kernel, expiry, score, bias, 9000, keep_window)
            bound = plan_model.length_bound(9000, keep_window, True, True)
            memory = plan_model.PlanMemory(plan, 18_000, 2, 2, True, bound)
            lists = [memory.head(head, b, b * 9000, 9000, True)[1] for b in range(2) for head in range(2)]
            heads.append(
                [(t, s.keys.tolist(), s.hulls.tolist()) for found in lists for t, s in found.items()]
            )
        assert heads[0] == heads[1] == heads[2]


# Computed over needed pairs for tiles of 32 positions, and entries per token, at 65536 tokens; docs/plan.md.
WASTE = {
    ("iid", 512): (1.145, 0.29),
    ("iid", 1024): (1.074, 0.57),
    ("iid", 2048): (1.038, 1.11),
    ("iid", 4096): (1.029, 1.17),
    ("drift", 1024): (1.217, 1.05),
    ("drift", 2048): (1.110, 1.77),
    ("sliding", 1024): (1.091, 1.48),
    ("sliding", 2048): (1.061, 1.97),
    ("half_immortal", 1024): (1.076, 1.48),
}


@pytest.mark.parametrize("process, keep_window", WASTE)
def test_waste_is_as_documented(kernel, process, keep_window):
    length = 65_536
    score = draw(process, (1, 1, length), keep_window)
    expiry = ranking.expiry(score, keep_window, True)
    ((_, segments),) = assert_equals_model(kernel, expiry, score, keep_window=keep_window)
    ratio, entries = plan_model.waste(segments, expiry[0, 0].numpy(), length)
    note(f"{process} w={keep_window}: computed/needed {ratio:.3f}, entries per token {entries:.2f}")
    most_waste, most_entries = WASTE[process, keep_window]
    assert 1 <= ratio <= most_waste + 0.01
    assert entries <= min(2, most_entries + 0.02)
