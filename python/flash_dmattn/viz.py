"""Pictures of a selection: which keys a head keeps, and for how long. Needs matplotlib.

Every function takes a causal expiry, [B, Hkv, Sk] or that of one head, [Sk], as select_keys returns it: key j
is visible to the positions j <= p < expiry_j, and one with expiry_j >= Sk is never evicted. It draws into ax,
or into a new figure, and returns the Axes.

    import flash_dmattn.viz
    score, expiry = layer.selection(hidden_states)
    flash_dmattn.viz.draw_intervals(expiry, score, head=1).figure.savefig("head1.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._validation import check_count, check_dtype, check_tensor, kind_of, refuse, shape_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_intervals", "draw_lifetimes", "draw_mask", "survival"]

MAX_MASK = 1024  # keys of a dense picture: beyond, one has less than a pixel
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow, too light for lines, left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NOT_VISIBLE = "#DDDDDD"


def draw_intervals(
    expiry: Tensor,
    score: Tensor | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """One bar per key, from its position to its expiry: the queries that see it.

    A bar is drawn a third of a point thick where a key has less: from some thousand keys on they overlap.

    Args:
        score: shaped like expiry. Colours a bar by the percentile of its key's score; a figure made here gets
            the colour bar too, for one of your own use colorbar(ax.collections[-1]).
        batch, head: which one to draw of an expiry [B, Hkv, Sk].
    """
    name = "draw_intervals"
    _check_expiry(name, expiry)
    if score is not None:
        check_tensor(name, "score", score)
        check_dtype(name, "score", score)
        if score.shape != expiry.shape:
            refuse(name, "score", shape_of(score), f"expiry's shape, {list(expiry.shape)}")
        score = _one_head(name, score, batch, head)
    expiry = _one_head(name, expiry, batch, head).long()
    is_new, ax = _axes_or_new(name, ax, (6.4, 5.6))
    from matplotlib.collections import PolyCollection

    seqlen = len(expiry)
    birth = torch.arange(seqlen)
    death = expiry.clamp(max=seqlen)
    seen = death > birth
    left, right, top = birth[seen], death[seen], birth[seen]
    corners = ((left, top), (right, top), (right, top + 1), (left, top + 1))
    bars = PolyCollection(
        torch.stack([torch.stack(corner, -1) for corner in corners], 1).numpy(),
        facecolors=COLORS[0],
        edgecolors="face",
        linewidths=0.3,  # points: what a bar thinner than a pixel needs to be seen
        snap=False,
    )
    if score is not None:
        bars.set(array=_percentile(score)[seen].numpy(), cmap="viridis_r", clim=(0, 100))
    ax.add_collection(bars)
    ax.set(xlim=(0, seqlen), ylim=(seqlen, 0), xlabel="position of the query", ylabel="position of the key")
    if is_new and score is not None:
        ax.figure.colorbar(bars, ax=ax, label="percentile of the key's score")
    return ax


def draw_mask(expiry: Tensor, *, batch: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """The dense mask that expiry stands for: queries down, keys across. At most 1024 keys.

    Args:
        batch, head: which one to draw of an expiry [B, Hkv, Sk].
    """
    name = "draw_mask"
    _check_expiry(name, expiry)
    seqlen = expiry.shape[-1]
    if seqlen > MAX_MASK:
        refuse(name, "expiry", shape_of(expiry), f"at most {MAX_MASK} keys; draw_intervals takes more")
    expiry = _one_head(name, expiry, batch, head)
    _, ax = _axes_or_new(name, ax, (5.6, 5.6))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    position, key = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    past = key <= position
    cells = past.to(torch.uint8) + (past & (position < expiry)).to(torch.uint8)
    ax.imshow(cells.numpy(), cmap=ListedColormap(["white", NOT_VISIBLE, COLORS[0]]), vmin=0, vmax=2)
    ax.set(xlabel="position of the key", ylabel="position of the query")
    ax.legend(
        handles=[Patch(color=COLORS[0], label="visible"), Patch(color=NOT_VISIBLE, label="not selected")],
        loc="upper right",
        frameon=False,
    )
    return ax


def draw_lifetimes(expiry: Tensor, keep_window_size: int | None = None, *, ax: Axes | None = None) -> Axes:
    """For each head, the share of keys that live for at least t positions: survival(expiry), on logarithmic
    axes.

    Args:
        keep_window_size: draws, beside the heads, the two extremes of selections that keep as many keys: a
            sliding window, where every key lives that long, and sinks, where the first keys live for ever and
            no other at all.
    """
    name = "draw_lifetimes"
    shares = _survival(name, expiry)
    if keep_window_size is not None:
        check_count(name, "keep_window_size", keep_window_size, minimum=1)
    _, ax = _axes_or_new(name, ax, (6.4, 4.4))

    num_heads, seqlen = shares.shape
    window = seqlen if keep_window_size is None else min(keep_window_size, seqlen)
    lowest = min([window / seqlen, *shares[shares > 0].tolist()])
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(1, max(2, seqlen)),
        ylim=(0.7 * lowest, 1.3),
        xlabel="t, positions",
        ylabel="share of keys that live for at least t",
    )
    many = num_heads > len(COLORS)
    for head, share in enumerate(shares):
        label = f"head {head}" if not many else f"{num_heads} heads" if head == 0 else None
        style = {"color": COLORS[0], "alpha": 0.4, "linewidth": 0.8} if many else {"color": COLORS[head]}
        # The ends of the levels of the share, which at t holds since t - 1.
        drawn = torch.ones(seqlen, dtype=torch.bool)
        drawn[1:-1] = share[1:-1] != share[2:]
        lifetimes = drawn.nonzero().flatten() + 1
        ax.plot(lifetimes.numpy(), share[drawn].numpy(), drawstyle="steps-pre", label=label, **style)
    if keep_window_size is not None:
        ax.axvline(window, color="gray", linestyle="--", linewidth=1, label=f"sliding window of {window}")
        ax.axhline(window / seqlen, color="gray", linestyle=":", linewidth=1, label=f"{window} sinks alone")
    if num_heads > 1 or keep_window_size is not None:
        ax.legend(frameon=False)
    return ax


def survival(expiry: Tensor) -> Tensor:
    """The share of keys that live for at least t = 1 .. Sk positions, per head: float64 [Hkv, Sk] for
    [B, Hkv, Sk], the batch taken together, and [1, Sk] for [Sk].

    The lifetime of a key that is never evicted is cut off by the end of the sequence. So the share is the
    product over s < t of 1 - (keys evicted after s positions) / (keys whose s-th position is followed by
    another), the estimator of Kaplan and Meier 1958.
    """
    return _survival("survival", expiry)


def _survival(function: str, expiry: Any) -> Tensor:
    _check_expiry(function, expiry)
    seqlen = expiry.shape[-1]
    expiry = expiry.detach().cpu().long().reshape(-1, 1 if expiry.dim() == 1 else expiry.shape[1], seqlen)
    lifetime = (expiry.clamp(max=seqlen) - torch.arange(seqlen)).clamp(min=0)
    shares = []
    for head in range(expiry.shape[1]):
        lived, evicted = lifetime[:, head].flatten(), expiry[:, head].flatten() < seqlen
        num_lived, num_evicted = (
            torch.bincount(values, minlength=seqlen + 1) for values in (lived, lived[evicted])
        )
        followed = len(lived) - num_lived.cumsum(0) + num_evicted
        shares.append((1 - num_evicted / followed.clamp(min=1).double()).cumprod(0)[:seqlen])
    return torch.stack(shares)


def _percentile(score: Tensor) -> Tensor:
    return score.argsort().argsort() * (100 / len(score))


def _check_expiry(function: str, expiry: Any) -> None:
    check_tensor(function, "expiry", expiry)
    if expiry.dtype not in (torch.int32, torch.int64):
        refuse(function, "expiry", str(expiry.dtype), "torch.int32, as from select_keys")
    if expiry.dim() not in (1, 3) or expiry.numel() == 0:
        refuse(function, "expiry", shape_of(expiry), "[B, Hkv, Sk] or [Sk], not empty")


def _one_head(function: str, tensor: Tensor, batch: int, head: int) -> Tensor:
    """[Sk], on the CPU."""
    sizes = (1, 1) if tensor.dim() == 1 else tensor.shape
    for name, index, size in (("batch", batch, sizes[0]), ("head", head, sizes[1])):
        if check_count(function, name, index, minimum=0) >= size:
            refuse(function, name, str(index), f"an int from 0 to {size - 1}")
    return (tensor if tensor.dim() == 1 else tensor[batch, head]).detach().cpu()


def _axes_or_new(function: str, ax: Any, size: tuple[float, float]) -> tuple[bool, Axes]:
    """Whether the Axes are new, and the Axes."""
    try:
        import matplotlib.axes
    except ImportError as error:
        raise ImportError(f"{function}: needs matplotlib: pip install flash-dmattn[viz]") from error
    if ax is None:
        from matplotlib import pyplot

        return True, pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, matplotlib.axes.Axes):
        refuse(function, "ax", kind_of(ax), "matplotlib Axes", TypeError)
    return False, ax
