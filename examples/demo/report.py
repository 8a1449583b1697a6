"""What the demo shows after the training: three pictures, and the attention timed beside PyTorch's own."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

from corpus import START
from flash_dmattn import flash_dmattn_func, select_keys, viz
from model import ModelConfig, Selection

REPEATS = 5


def draw_loss(
    times: list[float], losses: list[float], held_out: list[tuple[float, float]], bigram: float, path: Path
) -> None:
    smooth = torch.tensor(losses).unfold(0, min(20, len(losses)), 1).mean(1).tolist()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(times, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(times[-len(smooth) :], smooth, color="tab:blue", label="training, mean of 20 steps")
    axes.plot(*zip(*held_out), color="tab:orange", marker="o", label="held-out files")
    axes.axhline(bigram, color="tab:gray", linestyle="--", label="bigram model, the same held-out bytes")
    axes.set(xlabel="seconds of training", ylabel="loss, nats per byte", ylim=(1, min(4.5, max(losses))))
    axes.set_title("A byte-level language model with dynamic-mask attention, on Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_heads(selections: list[Selection], tokens: Tensor, path: Path) -> None:
    """For every key/value head the interval of positions that see each key of the first sequence, tokens."""
    heads_kv, seqlen = selections[0].expiry.shape[1:]
    figure, grid = plt.subplots(
        len(selections),
        heads_kv,
        figsize=(6 * heads_kv, 5.6 * len(selections)),
        layout="constrained",
        squeeze=False,
    )
    for layer, (score, expiry) in enumerate(selections):
        for head in range(heads_kv):
            axes = viz.draw_intervals(expiry, score, head=head, ax=grid[layer, head])
            dies = expiry[0, head].long()
            kept = int((dies == seqlen).sum())
            axes.set_title(
                f"layer {layer}, key/value head {head}: {kept} of {seqlen} keys seen at the end\n"
                f"kept longest, of frequent bytes: {_longest_kept(tokens, dies - torch.arange(seqlen))}",
                fontsize=10,
            )
    bars = grid[0, 0].collections[-1]
    figure.colorbar(bars, ax=grid, shrink=0.5, label="percentile of the key's score in the sequence")
    figure.suptitle(
        "What a head sees: key j is visible to the positions of its bar, from its own to its expiry"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_lifetimes(selections: list[Selection], keep_window: int, path: Path) -> None:
    """How long the heads of every layer keep their keys, between the two extremes."""
    figure, row = plt.subplots(
        1, len(selections), figsize=(6 * len(selections), 4.4), layout="constrained", squeeze=False
    )
    for layer, (axes, (_, expiry)) in enumerate(zip(row[0], selections)):
        viz.draw_lifetimes(expiry, keep_window, ax=axes).set_title(f"layer {layer}")
    lowest = min(axes.get_ylim()[0] for axes in row[0])
    plt.setp(row[0], ylim=(lowest, 1.3))
    figure.suptitle("How long a key is seen, on held-out files")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _longest_kept(tokens: Tensor, lifetime: Tensor) -> str:
    """The bytes of longest mean lifetime among those that make up at least half a percent of the sequence."""
    frequent = [
        byte for byte in tokens.unique().tolist() if (tokens == byte).sum() >= max(2, len(tokens) // 200)
    ]
    mean = {byte: lifetime[tokens == byte].float().mean().item() for byte in frequent}
    longest = sorted(frequent, key=mean.__getitem__, reverse=True)[:5]
    return ", ".join(f"{bytes([byte])!r:.8}"[1:] + f" {mean[byte]:.0f}" for byte in longest)


def readable(sample: Tensor) -> str:
    """Indented; ends where the model ends the file."""
    text = bytes(sample.tolist()).split(bytes([START]))[0].decode(errors="replace")
    return textwrap.indent(text, "    ", lambda line: True)


def time_attention(config: ModelConfig, seqlen: int) -> str:
    """One line: a layer's selection, forward and backward, and those of PyTorch's dense causal attention."""
    head_dim = config.width // config.heads
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    query, key, value = (
        tensor(1, seqlen, h, head_dim) for h in (config.heads, config.heads_kv, config.heads_kv)
    )
    score = tensor(1, config.heads_kv, seqlen)
    gradient = torch.randn(query.shape, generator=generator)

    def ours() -> None:
        expiry = select_keys(score, config.keep_window)
        out = flash_dmattn_func(query, key, value, attn_bias=score, expiry=expiry, is_causal=True)
        torch.autograd.grad(out, (query, key, value, score), gradient)

    def dense() -> None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (query, key, value), gradient.transpose(1, 2))

    times = _interleaved(ours, dense)
    return (
        f"Attention at [1, {seqlen}, {config.heads}, {head_dim}], forward and backward, median of {REPEATS}: "
        f"{1e3 * times[0]:.1f} ms; PyTorch's dense causal attention {1e3 * times[1]:.1f} ms "
        f"({times[1] / times[0]:.1f} times as long)."
    )


def _interleaved(*functions: Callable[[], None]) -> list[float]:
    """Median seconds of each, measured in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(REPEATS):
        for function, taken in zip(functions, times):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]
