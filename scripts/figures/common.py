"""What the figures have in common: colours, scores, selections, plans."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import flash_dmattn
import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import plan_model

# Okabe and Ito's palette: distinct for every kind of colour vision. The background is opaque: a page may be
# dark.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
plt.rcParams.update(
    {
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "flash_dmattn",
        "hatch.linewidth": 0.5,
    }
)


class Drawn(NamedTuple):
    figure: plt.Figure
    data: list[np.ndarray]  # what it shows


def normal_scores(length: int, seed: int = 0) -> np.ndarray:
    """RandomState: its numbers never change from one version of numpy to the next."""
    return np.random.RandomState(seed).standard_normal(length).astype(np.float32)


def select(score: np.ndarray, keep_window: int) -> np.ndarray:
    return flash_dmattn.select_keys(torch.from_numpy(score)[None, None], keep_window)[0, 0].numpy()


def plan_of(score: np.ndarray, keep_window: int) -> tuple[np.ndarray, int, dict[int, plan_model.Segment]]:
    """Expiry, the length of a segment, the segments."""
    expiry, size = select(score, keep_window), score.size
    bound = plan_model.length_bound(size, keep_window, True, True)
    length, segments = plan_model.plan_of_head(expiry, score, None, size, size, bound, True)
    return expiry, length, segments
