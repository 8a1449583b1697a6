"""The mask as intervals, and what may be skipped of it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle

from .common import BLUE, INK, ORANGE, PALE, VERMILION, Drawn, normal_scores, plan_model, plan_of, select


def mask() -> Drawn:
    size, keep_window = 32, 5
    expiry = select(normal_scores(size, seed=3), keep_window)
    key = np.arange(size)
    position = key[:, None]
    visible = (key <= position) & (position < expiry)
    figure, (dense, intervals) = plt.subplots(1, 2, figsize=(8.6, 5.1), layout="constrained", sharey=True)

    colours = np.where(expiry == size, BLUE, ORANGE)
    for axes in (dense, intervals):
        axes.set(xlim=(-0.7, size - 0.3), ylim=(size + 0.7, -0.7), xlabel="key j", aspect="equal")
        axes.set_xticks(range(0, size, 4))
        axes.set_yticks(range(0, size + 1, 4))
        axes.add_patch(
            plt.Polygon([(-0.5, -0.5), (size - 0.5, -0.5), (size - 0.5, size - 0.5)], color=PALE, lw=0)
        )
    rows, columns = np.nonzero(visible)
    cells = [Rectangle((j - 0.42, p - 0.42), 0.84, 0.84) for p, j in zip(rows, columns)]
    dense.add_collection(PatchCollection(cells, facecolors=colours[columns], linewidths=0))
    dense.set_ylabel("position of the query")
    dense.set_title(f"A dense mask: {size} x {size} bits", pad=20)

    seen = expiry > key
    intervals.vlines(key[seen], key[seen] - 0.42, expiry[seen] - 0.58, colors=colours[seen], linewidths=3)
    intervals.hlines(expiry[seen] - 0.5, key[seen] - 0.4, key[seen] + 0.4, colors=INK, linewidths=1)
    intervals.plot(key[~seen], key[~seen], "o", mfc="white", mec=INK, ms=4)
    intervals.set_title(f"The same mask: {size} integers", pad=20)
    numbers = intervals.secondary_xaxis("top")
    numbers.set_xticks(key, [str(e) for e in expiry], fontsize=6.5, rotation=90)
    numbers.tick_params(length=0, pad=1)
    numbers.spines["top"].set_visible(False)
    intervals.text(-1.2, -1.2, "expiry$_j$", fontsize=8, ha="right", va="bottom")
    handles = [
        Patch(color=BLUE, label=f"never evicted: expiry = {size}"),
        Patch(color=ORANGE, label="evicted by better keys"),
        plt.Line2D([], [], marker="o", ls="", mfc="white", mec=INK, ms=4, label="never selected: expiry = j"),
        Patch(color=PALE, label="later than the query"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return Drawn(figure, [expiry])


def tile_shares(expiry: np.ndarray, tile: int = 128) -> tuple[int, int]:
    """Tiles on and below the diagonal that hold a visible pair, and all of them."""
    size = expiry.size
    key = np.arange(size)
    tiles = size // tile
    deaths = np.where(expiry > key, expiry, 0).reshape(tiles, tile).max(1)
    # Position tile m meets the keys of tile n < m if one of them lives beyond its first position.
    last = -(-deaths // tile)
    occupied = np.maximum(last - np.arange(tiles), 0).sum()
    return int(occupied), tiles * (tiles + 1) // 2


def work(score: np.ndarray, keep_window: int) -> list[float]:
    """Pairs computed by tile skipping and by the plan, and visible pairs; over the causal triangle's."""
    expiry, _, segments = plan_of(score, keep_window)
    size = score.size
    triangle = size * (size + 1) / 2
    needed = int((np.minimum(expiry, size) - np.arange(size)).clip(0).sum())
    occupied, tiles = tile_shares(expiry)
    wasted, _ = plan_model.waste(segments, expiry, size)
    return [occupied / tiles, wasted * needed / triangle, needed / triangle]


def tiles() -> Drawn:
    size = 32768
    windows = [2**n for n in range(5, 16)]
    processes = {
        "Independent scores": normal_scores(size),
        "Equal scores: a sliding window": np.zeros(size, np.float32),
    }
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.7), layout="constrained", sharey=True)
    data = []
    for axes, (name, score) in zip(panels, processes.items()):
        shares = np.array([work(score, window) for window in windows])
        data.append(np.round(1e6 * shares).astype(np.int64))
        axes.plot(
            windows, shares[:, 0], "s-", color=VERMILION, ms=4.5, label="128 x 128 tiles that are not empty"
        )
        axes.plot(
            windows,
            shares[:, 1],
            "o-",
            color=BLUE,
            ms=4.5,
            label="computed by the plan, tiles of 32 positions",
        )
        axes.plot(windows, shares[:, 2], "--", color=INK, lw=1.2, label="visible pairs: the least possible")
        axes.set(xscale="log", yscale="log", xlabel="window w", title=name)
        axes.set_xticks(windows[::2], [str(window) for window in windows[::2]])
        axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
        axes.minorticks_off()
        axes.grid(color=PALE, lw=0.6)
    panels[0].set_ylabel("of dense causal attention")
    at = windows.index(1024)
    for row, offset in ((0, (0, -15)), (1, (12, -10))):
        share = data[0][at, row] / 1e6
        panels[0].annotate(
            f"w = 1024: {100 * share:.1f} %",
            (1024, share),
            xytext=offset,
            textcoords="offset points",
            ha="center" if row == 0 else "left",
            fontsize=8,
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return Drawn(figure, data)
