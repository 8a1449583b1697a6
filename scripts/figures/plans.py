"""A plan, and the kernels that read it."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from .common import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    VERMILION,
    Drawn,
    normal_scores,
    plan_model,
    plan_of,
)

LENGTH, WINDOW, TILE = 8192, 1024, 32


class Visit(NamedTuple):
    """How a tile of rows meets a block."""

    block: int
    count: int
    full: bool  # no key needs a test


def visits_of(segment: plan_model.Segment, begin: int, end: int) -> list[Visit]:
    found = []
    for block, (first, last, core_first, core_last) in enumerate(segment.hulls):
        count = min(plan_model.BLOCK, len(segment.keys) - block * plan_model.BLOCK)
        if first < end and begin < last:
            inside = core_first <= begin and end <= core_last
            found.append(Visit(block, count, bool(inside and count == plan_model.BLOCK)))
    return found


def fill_entries(
    axes: plt.Axes, segment: plan_model.Segment, begin: int, end: int, colours: tuple[str, str]
) -> int:
    """Every entry's positions inside the segment, one line per entry; returns the number of old keys."""
    births, deaths = np.maximum(segment.keys, begin), np.minimum(segment.expiry, end)
    num_old = int((segment.keys < begin).sum())
    edges = np.arange(len(births) + 1)
    for part, colour in zip((slice(0, num_old), slice(num_old, None)), colours):
        left, right = births[part], deaths[part]
        lines = edges[part.start : part.start + len(left) + 1]
        left, right = np.append(left, left[-1:]), np.append(right, right[-1:])
        axes.fill_betweenx(lines, left, right, step="post", color=colour, lw=0, rasterized=True)
    return num_old


def draw_blocks(axes: plt.Axes, segment: plan_model.Segment) -> None:
    block = plan_model.BLOCK
    for number, (first, last, core_first, core_last) in enumerate(segment.hulls):
        top, height = number * block, min(block, len(segment.keys) - number * block)
        axes.add_patch(Rectangle((first, top), last - first, height, fill=False, ec=INK, lw=0.7))
        if core_first < core_last:
            core = Rectangle((core_first, top), core_last - core_first, height, fill=False, ec="white", lw=0)
            core.set_hatch("////")
            core.set_alpha(0.55)
            axes.add_patch(core)


def plan() -> Drawn:
    _, length, segments = plan_of(normal_scores(LENGTH), WINDOW)
    number = 1
    segment, begin, end = segments[number], number * length, (number + 1) * length
    tile_begin = begin + 1216
    visits = visits_of(segment, tile_begin, tile_begin + TILE)
    figure, (axes, beside) = plt.subplots(
        1, 2, figsize=(8.6, 5.6), width_ratios=[1, 0.05], layout="constrained", sharey=True
    )
    num_old = fill_entries(axes, segment, begin, end, (BLUE, ORANGE))
    draw_blocks(axes, segment)
    axes.axvspan(tile_begin, tile_begin + TILE, color=VERMILION, alpha=0.85, lw=0)
    size = len(segment.keys)
    axes.set(xlim=(begin, end), ylim=(size, 0), xlabel="position")
    axes.set_ylabel("entry of the list, in blocks of 64")
    axes.set_title(
        f"Segment {number} of a head: {num_old} old keys by descending rank, then {size - num_old} births"
    )
    axes.set_yticks([0, *range(256, size, 256), size])
    axes.set_xticks(range(begin, end + 1, 256))
    axes.axhline(num_old, color=INK, lw=1.4, ls=(0, (4, 2)))

    kinds = {visit.block: visit.full for visit in visits}
    for block in range(len(segment.hulls)):
        top, height = block * plan_model.BLOCK, min(plan_model.BLOCK, size - block * plan_model.BLOCK)
        colour = "white" if block not in kinds else GREEN if kinds[block] else PURPLE
        beside.add_patch(Rectangle((0, top), 1, height, fc=colour, ec=GREY, lw=0.5))
    beside.set(xlim=(0, 1), xticks=[])
    beside.set_title("visits", fontsize=8, loc="center")
    for spine in beside.spines.values():
        spine.set_visible(False)
    beside.tick_params(left=False)
    full = sum(visit.full for visit in visits)
    handles = [
        Patch(fc=BLUE, label="old key, visible"),
        Patch(fc=ORANGE, label="born key, visible"),
        Patch(fc="white", ec=INK, label="hull of a block"),
        Patch(fc=BLUE, ec="white", hatch="////", label="core of a block"),
        Patch(fc=VERMILION, label=f"a tile of {TILE} positions"),
        Patch(fc=GREEN, label=f"visited in the core: no test ({full})"),
        Patch(fc=PURPLE, label=f"visited, keys tested ({len(visits) - full})"),
        Patch(fc="white", ec=GREY, label=f"not visited ({len(segment.hulls) - len(visits)})"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return Drawn(figure, [segment.keys, segment.expiry, segment.hulls])


LANES = ("copy entries", "copy K", "copy V", "S = Q K$^T$", "logits, softmax", "O += P V")
STEP, MIDDLE = 5.2, 2.1  # from the first barrier of a step to that of the next, and to its second


def boxes_of(visits: list[Visit]) -> list[tuple[int, float, float, str, int]]:
    """What forward_kernel does for these visits: lane, begin, end, label, step. A copy begins at a barrier
    and has ended by the next one; the lengths of boxes say nothing else."""
    boxes = []
    for step, visit in enumerate(visits):
        first, second, end = STEP * step, STEP * step + MIDDLE, STEP * (step + 1)
        boxes += [
            (2, first, second, f"V {visit.block}", step),
            (3, first, second, f"{visit.block}", step),
            (4, second, second + 1.5, "no test" if visit.full else "tests", step),
            (5, second + 1.5, end, f"{visit.block}", step),
        ]
        if step + 1 < len(visits):
            name = str(visits[step + 1].block)
            boxes += [(0, first, second, name, step + 1), (1, second, end, f"K {name}", step + 1)]
    name = str(visits[0].block)
    return [(0, -3.6, -2.0, name, 0), (1, -2.0, 0.0, f"K {name}", 0), *boxes]


def forward() -> Drawn:
    _, length, segments = plan_of(normal_scores(LENGTH), WINDOW)
    begin = length + 1216
    visits = visits_of(segments[1], begin, begin + TILE)
    tested = next(n for n, visit in enumerate(visits) if not visit.full)
    shown = visits[tested - 1 :][:3]
    figure, axes = plt.subplots(figsize=(8.6, 3.7), layout="constrained")
    colours = (BLUE, ORANGE, GREEN)
    for lane, left, right, label, step in boxes_of(shown):
        colour, is_copy = colours[step], lane < 3
        place, size = (left + 0.05, lane - 0.36), (right - left - 0.1, 0.72)
        axes.add_patch(Rectangle(place, *size, fc="white" if is_copy else colour, ec=colour, lw=1.6))
        ink = "white" if not is_copy and colour != ORANGE else INK
        axes.text((left + right) / 2, lane, label, ha="center", va="center", fontsize=8, color=ink)
    for step in range(len(shown)):
        for place, text in (
            (0, f"K {shown[step].block}\nis there"),
            (MIDDLE, f"V {shown[step].block}\nis there"),
        ):
            x = STEP * step + place
            axes.vlines(x, -0.6, len(LANES), color=INK, lw=0.9, ls=(0, (3, 2)), zorder=0)
            axes.text(x, -0.7, text, fontsize=7.5, ha="center", va="bottom")
    axes.set(xlim=(-3.9, STEP * len(shown) + 0.1), ylim=(len(LANES) - 0.5, -1.5), xticks=[])
    axes.set_yticks(range(len(LANES)), LANES)
    axes.tick_params(left=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    handles = [
        Patch(fc="white", ec=INK, lw=1.4, label="copy under way"),
        Patch(fc=INK, label="computation"),
        plt.Line2D(
            [], [], color=INK, lw=0.9, ls=(0, (3, 2)), label="all wait for their copies, then for each other"
        ),
    ]
    handles += [Patch(fc=colour, label=f"block {visit.block}") for colour, visit in zip(colours, shown)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, columnspacing=1.2)
    return Drawn(figure, [np.array([[visit.block, visit.count, visit.full] for visit in visits])])


def backward() -> Drawn:
    expiry, length, segments = plan_of(normal_scores(LENGTH), WINDOW)
    figure, panels = plt.subplots(1, len(segments), figsize=(8.6, 4.6), sharey=True, layout="constrained")
    longest = max(len(segment.keys) for segment in segments.values())
    born_early = np.arange(LENGTH) < length // 2
    through = int(np.flatnonzero((expiry == LENGTH) & born_early)[-1])
    tile_begin, block, block_size = 2 * length + 448, 11, plan_model.BLOCK
    for axes, (number, segment) in zip(panels, segments.items()):
        begin, end = number * length, (number + 1) * length
        fill_entries(axes, segment, begin, end, (PALE, "#c8c8c8"))
        if number == 1:
            first, last, *_ = segment.hulls[block]
            axes.add_patch(
                Rectangle((first, block_size * block), last - first, block_size, fc=BLUE, zorder=3)
            )
        if number == 2:
            for visit in visits_of(segment, tile_begin, tile_begin + TILE):
                place = (tile_begin, block_size * visit.block)
                axes.add_patch(Rectangle(place, TILE, visit.count, fc=ORANGE, ec=ORANGE, lw=1.2, zorder=3))
        entry = int(np.flatnonzero(segment.keys == through)[0])
        axes.hlines(entry, max(through, begin), end, color=VERMILION, lw=2, zorder=4)
        axes.annotate(
            f"partial row r{f' + {number}' if number else ''}",
            (end, entry),
            xytext=(-2, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            zorder=5,
        )
        axes.set(xlim=(begin, end), ylim=(longest, 0), xticks=[begin, begin + length // 2], xlabel="position")
        axes.set_title(f"segment {number}")
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("entry of the segment's list")
    handles = [
        Patch(fc=PALE, label="old keys"),
        Patch(fc="#c8c8c8", label="births"),
        Patch(fc=BLUE, label="dK, dV, dbias of a block: one CTA, its rows pass"),
        Patch(fc=ORANGE, label="dQ of a tile of rows: one CTA, its keys pass"),
        plt.Line2D(
            [], [], color=VERMILION, lw=2, label=f"key {through}: its rows r to r + 3 are added in this order"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return Drawn(figure, [expiry])
