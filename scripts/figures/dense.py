"""A dense mask, compacted in both directions."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from .common import BLUE, GREY, INK, ORANGE, Drawn


def random_mask(size: int, keep_window: int) -> np.ndarray:
    """Each row sees keep_window keys up to its own, drawn at random: no interval per key describes it."""
    score = np.random.RandomState(1).random_sample((size, size))
    score[np.triu_indices(size, 1)] = -1
    kept = np.argsort(-score, axis=1, kind="stable")[:, :keep_window]
    seen = np.zeros((size, size), bool)
    np.put_along_axis(seen, kept, True, 1)
    return seen & (score >= 0)


def draw_bits(axes: plt.Axes, bits: np.ndarray, colour: str) -> None:
    """bits[row, column]; every cell has an outline."""
    for value, face in ((False, "white"), (True, colour)):
        cells = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(bits == value)]
        axes.add_collection(PatchCollection(cells, facecolors=face, edgecolors=GREY, linewidths=0.35))
    rows, columns = bits.shape
    axes.set(xlim=(-0.7, columns - 0.3), ylim=(rows - 0.3, -0.7), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=1)


def dense() -> Drawn:
    size, tile, first_row, first_key = 64, 8, 48, 16
    seen = random_mask(size, 4)
    rows, keys = slice(first_row, first_row + tile), slice(first_key, first_key + tile)
    listed_keys, listed_rows = np.flatnonzero(seen[rows].any(0)), np.flatnonzero(seen[:, keys].any(1))
    figure = plt.figure(figsize=(8.6, 4.7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 1])
    whole, by_row, by_key = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )

    whole.add_patch(Rectangle((-0.5, first_row - 0.5), size, tile, fc=BLUE, alpha=0.22, lw=0))
    whole.add_patch(Rectangle((first_key - 0.5, -0.5), tile, size, fc=ORANGE, alpha=0.3, lw=0))
    cells = [Rectangle((key - 0.5, row - 0.5), 1, 1) for row, key in np.argwhere(seen)]
    whole.add_collection(PatchCollection(cells, facecolors=INK, linewidths=0))
    whole.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal", xlabel="key", ylabel="row")
    whole.set_xticks(range(0, size, 8))
    whole.set_yticks(range(0, size, 8))
    whole.set_title(f"A mask without intervals: {size} rows, {seen[-1].sum()} keys each")

    draw_bits(by_row, seen[rows][:, listed_keys], BLUE)
    by_row.set_xticks(range(len(listed_keys)), listed_keys, rotation=90, fontsize=6.5)
    by_row.set_yticks(range(tile), range(first_row, first_row + tile), fontsize=6.5)
    by_row.set(xlabel="listed key, a bit per row", ylabel="row")
    by_row.set_title(f"A tile of rows: {len(listed_keys)} keys of {first_row + tile}")
    draw_bits(by_key, seen[listed_rows, keys].T, ORANGE)
    by_key.set_xticks(range(len(listed_rows)), listed_rows, rotation=90, fontsize=6.5)
    by_key.set_yticks(range(tile), range(first_key, first_key + tile), fontsize=6.5)
    by_key.set(xlabel="listed row, a bit per key", ylabel="key")
    by_key.set_title(f"A tile of keys: {len(listed_rows)} rows of {size - first_key}")
    return Drawn(figure, [seen])
