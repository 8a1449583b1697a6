"""P1: selection is exact under the documented order. Integers, so every comparison is equality.

The heap is held against the definition on every small score vector, the kernels against both: exhaustively
where the vectors are short, against the heap where they are long, odd or strange.
"""

import itertools

import numpy as np
import pytest
import torch

import ranking
from cases import DTYPES, INT32_MAX, SCORES, draw_score
from counters import count
from emulated import EmulatedKernel

ALSO_TAKEN = ("f32",)  # types of scores that every kernel takes, whatever those of its queries
WINDOWS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1024)


def cut_to_queries(expiry, num_queries):
    """What the last num_queries rows need of expiry: keys that none of them sees get their own position."""
    length = expiry.shape[-1]
    own = torch.arange(length, dtype=torch.int32).expand_as(expiry)
    return torch.where(expiry <= length - num_queries, own, expiry)


def assert_equals_heap(
    kernel, score, keep_window, causal=True, num_sinks=0, local_window=0, cu_seqlens=None, queries=(-1,)
):
    """Of `queries`, every number of rows that read expiry; -1: all."""
    every = ranking.expiry(score, keep_window, causal, num_sinks, local_window, cu_seqlens)
    rule = (score, keep_window, causal, num_sinks, local_window, cu_seqlens)
    for num_queries in queries:
        actual = kernel.select_keys(*rule) if num_queries < 0 else kernel.select_keys(*rule, num_queries)
        wanted = every if num_queries < 0 else cut_to_queries(every, num_queries)
        given = f"{keep_window=}, {causal=}, {num_sinks=}, {local_window=}, {num_queries=}"
        assert_equal(actual, wanted, score, given)


def assert_equal(actual, wanted, score, given):
    assert (actual.dtype, actual.shape, actual.is_contiguous()) == (torch.int32, score.shape, True)
    wrong = (actual.cpu() != wanted).nonzero()
    at = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), (
        f"{len(wrong)} of {actual.numel()} expiries are not the heap's: {given}, {score.dtype}; "
        f"first {list(at)}: got {actual[at]}, heap {wanted[at]}, score {score[at]}"
    )
    count("selection", actual.numel())


def every_vector(length):
    return np.array(list(itertools.product((-np.inf, -1.0, -0.0, 0.0, 1.0), repeat=length)))


@pytest.mark.parametrize("causal", [True, False])
def test_visibility_is_an_interval_and_the_heap_finds_its_end(causal):
    for length in range(1, 6):
        scores = every_vector(length)
        for keep_window in range(1, length + 2):
            visible = ranking.visible(scores, keep_window, causal)
            heap = ranking.expiry(torch.from_numpy(scores)[:, None], keep_window, causal)[:, 0].numpy()
            position, key = np.arange(length)[:, None], np.arange(length)
            position, born = (position, key) if causal else (np.full_like(position, length - 1), 0)
            assert np.array_equal(visible, (born <= position) & (position < heap[:, None, :]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_short_score_vector(kernel, dtype, causal):
    """5^7 vectors of length 7, and all shorter ones, for every w from 1 to 8."""
    # Emulated, those of length 7 would take minutes.
    longest = (5 if causal else 4) if isinstance(kernel, EmulatedKernel) else 7
    for length in range(1, longest + 1):
        scores = every_vector(length)
        counts, enabled = ranking.rank_counts(scores)
        past = np.arange(length)[:, None] >= np.arange(length)
        batch = torch.from_numpy(scores).to(DTYPES[dtype])[:, None].to(kernel.device)
        for keep_window in range(1, 9):
            if causal:
                wanted = np.arange(length) + ((counts < keep_window) & enabled[:, None] & past).sum(1)
            else:
                wanted = np.where((counts[:, -1] < keep_window) & enabled, length, np.arange(length))
            actual = kernel.select_keys(batch, keep_window, causal).cpu().numpy()[:, 0]
            wrong = np.argwhere((actual != wanted).any(1))
            assert not len(wrong), (
                f"w={keep_window}, scores {scores[wrong[0, 0]]}: got {actual[wrong[0, 0]]}, "
                f"by definition {wanted[wrong[0, 0]]}"
            )
            count("selection", actual.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in SCORES if kind != "tiny"])
def test_random_scores(kernel, kind, dtype):
    for seed, (length, windows) in enumerate(
        ((1, (1, 2)), (7, (1, 3, 7, 8)), (300, WINDOWS), (2500, (1, 33, 256, 1024)))
    ):
        score = draw_score(kind, (2, 2, length), DTYPES[dtype], seed).to(kernel.device)
        for keep_window in windows:
            assert_equals_heap(kernel, score, keep_window)
        assert_equals_heap(kernel, score, windows[-1], causal=False)


@pytest.mark.parametrize("length", [1, 2, 64, 257, 2049])
def test_windows_about_as_long_as_the_sequence_and_longer(kernel, length):
    score = draw_score("quantised", (2, 3, length), torch.float32).to(kernel.device)
    for keep_window in (max(1, length - 1), length, length + 1, INT32_MAX):
        for causal in (True, False):
            assert_equals_heap(kernel, score, keep_window, causal)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_bit_pattern_of_the_short_types(kernel, dtype):
    """Denormals, both zeros, infinities and every NaN, in a random order."""
    bits = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    score = (bits - (1 << 15)).to(torch.int16).view(DTYPES[dtype])[None, None].to(kernel.device)
    for keep_window in (1, 100, 5000, 60000):
        assert_equals_heap(kernel, score, keep_window)
    assert_equals_heap(kernel, score, 5000, causal=False)


@pytest.mark.parametrize("width", [32, 64])
def test_random_bit_patterns(kernel, width):
    dtype = f"f{width}"
    if dtype not in (*kernel.dtypes, *ALSO_TAKEN):
        pytest.skip("not a type of its scores")
    bits = torch.int32 if dtype == "f32" else torch.int64
    score = torch.randint(-(2**62), 2**62, (2, 2, 4000), generator=torch.Generator().manual_seed(2)) * 2 + 1
    score = (score >> (32 if dtype == "f32" else 0)).to(bits).view(DTYPES[dtype])
    for index, value in enumerate((torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0)):
        score[..., index::97] = value
    for keep_window in (1, 64, 1000):
        assert_equals_heap(kernel, score.to(kernel.device), keep_window)


def test_float64_scores_are_ranked_in_float64_or_refused(kernel):
    score = (1 + torch.randperm(500, generator=torch.Generator().manual_seed(3)) * 2.0**-50).double()[
        None, None
    ]
    assert len(score.float().unique()) == 1
    if "f64" not in kernel.dtypes:
        with pytest.raises(Exception, match="takes float32, bfloat16 and float16 scores, not float64"):
            kernel.select_keys(score.to(kernel.device), 1)
        return
    for keep_window in (1, 20, 499):
        assert_equals_heap(kernel, score.to(kernel.device), keep_window)


@pytest.mark.parametrize("kind", ["normal", "equal", "minus_inf", "nan", "disabled", "falling"])
@pytest.mark.parametrize(
    "num_sinks, local_window",
    [(1, 0), (4, 0), (0, 1), (0, 7), (3, 300), (10**6, 0), (0, 2**31 - 1), (2**31 - 1, 2**31 - 1), (5, 65)],
)
def test_sinks_and_local_keys_come_on_top(kernel, kind, num_sinks, local_window):
    score = draw_score(kind, (2, 2, 200), torch.float32).to(kernel.device)
    for keep_window in (1, 16, 200):
        assert_equals_heap(kernel, score, keep_window, True, num_sinks, local_window)
        assert_equals_heap(kernel, score, keep_window, False, num_sinks, 0)


@pytest.mark.parametrize("lengths", [(5, 0, 130, 1, 64), (0, 0, 9), (9, 0, 0), (0,), (), (0, 0, 0), (300,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_select_on_their_own(kernel, dtype, lengths):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=kernel.device)
    for kind in ("normal", "two_values", "nan"):
        score = draw_score(kind, (3, sum(lengths)), DTYPES[dtype]).T.contiguous().to(kernel.device)
        for keep_window in (1, 16, 64, INT32_MAX):
            assert_equals_heap(kernel, score, keep_window, True, 0, 0, cu_seqlens)
        assert_equals_heap(kernel, score, 16, True, 2, 5, cu_seqlens)
        assert_equals_heap(kernel, score, 16, False, 2, 0, cu_seqlens)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty_tensors(kernel, shape):
    assert_equals_heap(kernel, torch.empty(shape, device=kernel.device), 4)
    assert_equals_heap(kernel, torch.empty(shape, device=kernel.device), 4, causal=False)


def test_strides_do_not_matter_and_the_input_is_only_read(kernel):
    dense = draw_score("quantised", (2, 3, 400), torch.float32).to(kernel.device)
    forms = {
        "heads last": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": torch.stack([dense, torch.full_like(dense, torch.nan)], -1).flatten(2)[..., ::2],
        "keys first": dense.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "batch expanded": dense[:1].expand(4, -1, -1),
        "heads expanded": dense[:, :1].expand(-1, 5, -1),
        "one value": dense[:1, :1, :1].expand(2, 2, 100),
        "offset": torch.cat([dense.new_full((1,), torch.nan), dense.flatten()])[1:].view_as(dense),
    }
    for name, score in forms.items():
        before = score.clone()
        assert_equals_heap(kernel, score, 32)
        assert torch.equal(score, before), name


@pytest.mark.parametrize("kind", ["normal", "equal", "rising", "falling", "two_values"])
def test_a_long_sequence(kernel, kind):
    score = draw_score(kind, (1, 1, 100_000), torch.float32).to(kernel.device)
    for keep_window in (1, 1024, 99_999):
        assert_equals_heap(kernel, score, keep_window)


def test_a_prefix_selects_as_it_does_in_the_whole(kernel):
    """Causality: expiry of the prefix is expiry of the whole, cut at the prefix's end."""
    score = draw_score("quantised", (1, 2, 3000), torch.float32).to(kernel.device)
    whole = kernel.select_keys(score, 200)
    for length in (1, 199, 200, 201, 1024, 2048, 2999):
        assert torch.equal(
            kernel.select_keys(score[..., :length], 200), whole[..., :length].clamp(max=length)
        )
        count("selection", 2 * length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "equal", "quantised", "rising", "nan"])
def test_rows_that_read_expiry(kernel, kind, dtype):
    for length in (1, 2, 33, 700, 3000):
        score = draw_score(kind, (2, 2, length), DTYPES[dtype]).to(kernel.device)
        queries = sorted({0, 1, 2, length // 7, length // 2, length // 2 + 1, length - 1, length})
        for keep_window in (1, 40, 999, 2990):
            assert_equals_heap(kernel, score, keep_window, queries=[q for q in queries if q <= length])
        assert_equals_heap(kernel, score, 20, True, 3, 0, None, queries=[0, 1])
        assert_equals_heap(kernel, score, 20, True, 3, 25, None, queries=[0, 1, length // 7])


@pytest.mark.parametrize("kind", ["normal", "quantised", "rising", "equal"])
def test_few_rows_of_a_long_sequence(kernel, kind):
    score = draw_score(kind, (1, 2, 70_000), torch.float32).to(kernel.device)
    for keep_window in (1, 1000, 40_000):
        assert_equals_heap(kernel, score, keep_window, queries=[1, 3, 1100, 34_000])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(40_000, 0, 5, 33_000, 2000), (1, 32_768, 32_769), (1025, 1024, 1023, 256, 257)]
)
def test_long_packed_sequences(kernel, lengths, causal):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=kernel.device)
    score = draw_score("quantised", (2, sum(lengths)), torch.float32).T.to(kernel.device)
    for keep_window in (1, 1024, 33_000):
        assert_equals_heap(kernel, score, keep_window, causal, 0, 0, cu_seqlens)


@pytest.mark.parametrize("causal", [True, False])
def test_more_heads_than_a_grid_has_rows(kernel, causal):
    sizes = (1100, 60, 3) if causal or not isinstance(kernel, EmulatedKernel) else (110, 6, 3)
    score = draw_score("quantised", sizes, torch.float32).to(kernel.device)
    assert_equals_heap(kernel, score, 2, causal)
