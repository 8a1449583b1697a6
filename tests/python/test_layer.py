"""nn.DynamicMaskAttention: the layer is the composition that its documentation writes down."""

import pytest
import torch
from flash_dmattn.nn import DynamicMaskAttention
from torch.nn import functional

import ranking
from counters import count
from kernels import bit_for_bit, forced

B, S, HIDDEN, H, HKV, D, W = 2, 40, 48, 6, 2, 8, 9


def layer_of(kernel, score_function="exp", dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = DynamicMaskAttention(
        HIDDEN, H, num_kv_heads=HKV, keep_window_size=W, score_function=score_function, **options
    )
    layer = layer.to(kernel.device, dtype)
    with torch.no_grad():
        layer.A.copy_(torch.tensor([0.7, -0.4]))
    return layer


def hidden_of(kernel, dtype=torch.float64, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (B, S, HIDDEN), generator=generator, dtype=torch.float64).to(
        kernel.device, dtype
    )


def composed(layer, hidden, score_function, mask=None, sinks=0, local=0):
    """By hand: projections, score from the values, selection by the heap, dense softmax."""
    query = layer.q_proj(hidden).unflatten(-1, (H, D))
    key = layer.k_proj(hidden).unflatten(-1, (HKV, D))
    flat = layer.v_proj(hidden)
    score = layer.A * functional.softplus(layer.dt_proj(flat))
    score = (torch.exp(score) if score_function == "exp" else score).transpose(1, 2)
    ranked = score.detach() if mask is None else score.detach().masked_fill(~mask[:, None], -torch.inf)
    expiry = ranking.expiry(ranked, W, True, sinks, local).to(hidden.device)
    position = torch.arange(S, device=hidden.device)
    sees = (position <= position[:, None]) & (position[:, None] < expiry[..., None, :])
    value = flat.unflatten(-1, (HKV, D))
    key, value = key.repeat_interleave(H // HKV, 2), value.repeat_interleave(H // HKV, 2)
    logits = (
        torch.einsum("bqhd,bkhd->bhqk", query, key) * D**-0.5
        + score.repeat_interleave(H // HKV, 1)[:, :, None]
    )
    logits = logits.masked_fill(~sees.repeat_interleave(H // HKV, 1), -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0)
    return layer.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(num_sinks=3), dict(local_window=12), dict(qkv_bias=True, dt_bias=True, out_bias=True)],
    ids=str,
)
@pytest.mark.parametrize("score_function", ["exp", "linear"])
def test_equals_its_composition(kernel, score_function, options, padded):
    layer = layer_of(kernel, score_function, **options)
    hidden = hidden_of(kernel)
    mask = None
    if padded:
        mask = torch.ones(B, S, dtype=torch.bool, device=kernel.device)
        mask[0, :5], mask[1, 33:] = False, False
    results = []
    extras = options.get("num_sinks", 0), options.get("local_window", 0)
    for call in (
        lambda: layer(hidden, attn_mask=mask),
        lambda: composed(layer, hidden, score_function, mask, *extras),
    ):
        layer.zero_grad()
        out = call()
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
        results.append([out, *(parameter.grad.clone() for parameter in layer.parameters())])
    for name, first, second in zip(["out", *(name for name, _ in layer.named_parameters())], *results):
        torch.testing.assert_close(
            first, second, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
        count("property")


@pytest.mark.parametrize("score_function", ["exp", "linear"])
def test_gradients_reach_the_score(kernel, score_function):
    layer = layer_of(kernel, score_function, torch.float32)
    layer(hidden_of(kernel, torch.float32)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    count("property")


def test_starts_as_a_sliding_window(kernel):
    """A = 0: all scores tie, so every query sees the last W tokens."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(HIDDEN, H, num_kv_heads=HKV, keep_window_size=W).to(kernel.device)
    assert (layer.A == 0).all() and layer.A.requires_grad
    score, expiry = layer.selection(hidden_of(kernel, torch.float32))
    assert (score == 1).all()
    assert torch.equal(expiry.cpu(), (torch.arange(S) + W).clamp(max=S).int().expand(B, HKV, S))
    layer(hidden_of(kernel, torch.float32)).sum().backward()
    assert layer.A.grad.abs().max() > 0
    count("selection", expiry.numel())


@pytest.mark.parametrize("score_function", ["exp", "linear"])
def test_selection_shows_what_forward_uses(kernel, score_function):
    layer = layer_of(kernel, score_function, num_sinks=2, local_window=4)
    mask = torch.rand(B, S, device=kernel.device) < 0.8
    score, expiry = layer.selection(hidden_of(kernel), attn_mask=mask)
    hidden_score = score.detach().masked_fill(~mask[:, None], -torch.inf)
    assert torch.equal(expiry.cpu(), ranking.expiry(hidden_score, W, True, 2, 4))
    count("selection", expiry.numel())


def test_padding_is_not_seen(kernel):
    """What padding holds changes no token that is there, and its gradient is that of its own row alone."""
    layer = layer_of(kernel)
    mask = torch.rand(B, S, device=kernel.device) < 0.7
    first = hidden_of(kernel)
    second = torch.where(mask[..., None], first, 7 * torch.randn_like(first))
    assert bit_for_bit(layer(first, attn_mask=mask)[mask], layer(second, attn_mask=mask)[mask])
    assert bit_for_bit(layer(first, attn_mask=mask), layer(first, attn_mask=mask.int()))
    count("bitwise", 2)


@pytest.mark.parametrize("score_function", ["exp", "linear"])
def test_packed_equals_separate(kernel, score_function):
    layer = layer_of(kernel, score_function, num_sinks=1)
    lengths = (13, 1, 26)
    hidden = hidden_of(kernel, torch.float64, sum(lengths), HIDDEN)
    cu_seqlens = torch.tensor([0, 13, 14, 40], dtype=torch.int32, device=kernel.device)
    packed = layer(hidden, cu_seqlens=cu_seqlens)
    alone = torch.cat([layer(part[None])[0] for part in hidden.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)
    count("property")


def test_rotary_embeddings_turn_queries_and_keys(kernel):
    """A rotation by the position leaves the attention a function of distance: shifting all angles changes
    nothing."""
    layer = layer_of(kernel, qk_norm=True)
    hidden = hidden_of(kernel)
    frequency = 100.0 ** (-torch.arange(0, D, 2, device=kernel.device, dtype=torch.float64) / D)

    def embeddings(shift):
        angle = torch.outer(torch.arange(S, device=kernel.device) + shift, frequency).repeat(1, 2)
        return angle.cos(), angle.sin()

    plain, rotated, shifted = layer(hidden), layer(hidden, embeddings(0)), layer(hidden, embeddings(11.5))
    torch.testing.assert_close(rotated, shifted, rtol=1e-9, atol=1e-11)
    assert (plain - rotated).abs().max() > 1e-3
    per_batch = tuple(part.expand(B, S, D) for part in embeddings(0))
    assert bit_for_bit(layer(hidden, per_batch), rotated)
    count("property", 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_in_half_precision(kernel, dtype):
    layer = layer_of(kernel, "exp", dtype)
    score, _ = layer.selection(hidden_of(kernel, dtype))
    assert score.dtype == torch.float32
    assert layer(hidden_of(kernel, dtype)).dtype == dtype
    with torch.autocast(kernel.device, dtype=dtype):
        wide = layer_of(kernel, "exp", torch.float32)
        score, _ = wide.selection(hidden_of(kernel, torch.float32))
        assert (
            score.dtype == torch.float32 and wide(hidden_of(kernel, torch.float32)).dtype == dtype
        )  # as of nn.Linear
    count("property", 4)


def test_state_dict_deepcopy_and_meta_device(kernel):
    layer = layer_of(kernel, qkv_bias=True, qk_norm=True)
    names = set(layer.state_dict())
    assert {
        "A",
        "dt_proj.weight",
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
    } <= names
    meta = DynamicMaskAttention(
        HIDDEN, H, num_kv_heads=HKV, keep_window_size=W, qkv_bias=True, qk_norm=True, device="meta"
    )
    other = meta.to_empty(device=kernel.device).to(torch.float64)
    other.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in other.parameters()) and (other.A == 0).all()
    other.load_state_dict(layer.state_dict())
    assert bit_for_bit(other(hidden_of(kernel)), layer(hidden_of(kernel)))
    for word in ("num_heads=6", "keep_window_size=9", "score_function='exp'"):
        assert word in repr(layer)
    count("bitwise")


def test_the_reference_backend_runs_the_layer_too(kernel):
    layer = layer_of(kernel)
    with forced("reference"):
        wanted = layer(hidden_of(kernel))
    torch.testing.assert_close(layer(hidden_of(kernel)), wanted, rtol=1e-10, atol=1e-12)
    count("property")


def test_a_small_model_learns(kernel):
    """Copying the token that a marker announced 20 tokens before needs a key that the sliding start does not
    keep."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(32, 4, num_kv_heads=2, keep_window_size=8, score_function="linear").to(
        kernel.device
    )
    embed, head = torch.nn.Embedding(10, 32).to(kernel.device), torch.nn.Linear(32, 10).to(kernel.device)
    parameters = [*layer.parameters(), *embed.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(250):
        tokens = torch.randint(0, 8, (32, 24), device=kernel.device)
        tokens[:, 3:] = 9
        tokens[:, :3] = tokens[:, :1]
        loss = functional.cross_entropy(head(layer(embed(tokens)))[:, -1], tokens[:, 0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.5, losses[::50]
    count("property")
