"""Draws a result file: per case one bar per method, its stages stacked, with the spread of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "mask": "tab:gray",
    "select": "tab:red",
    "plan": "tab:pink",
    "forward": "tab:blue",
    "backward": "tab:orange",
}


def draw(source: Path, target: Path) -> None:
    report = json.loads(source.read_text())
    cases = [case for case in report["cases"] if case["methods"]]
    heights = [1 + 0.45 * len(case["methods"]) for case in cases]
    figure, grid = plt.subplots(
        len(cases),
        1,
        figsize=(9, sum(heights) + 0.6),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, case in zip(grid[:, 0], cases):
        _draw_case(axes, case)
    grid[-1, 0].set_xlabel("milliseconds, median; the line is the 10th to the 90th percentile")
    stages = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(stages, COLOURS, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    environment = report["environment"]
    figure.suptitle(
        f"{environment.get('gpu', environment['cpu'])}, {environment['threads']} threads, "
        f"torch {environment['torch']}, commit {environment['commit']}",
        fontsize=8,
        x=0.01,
        ha="left",
    )
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(f"Wrote {target}.")


def _draw_case(axes: plt.Axes, case: dict) -> None:
    for row, (name, found) in enumerate(case["methods"].items()):
        left = 0.0
        for stage, seconds in found["seconds"].items():
            if stage != "total":
                axes.barh(row, 1e3 * seconds["median"], left=left, color=COLOURS[stage])
                left += 1e3 * seconds["median"]
        total = {name: 1e3 * found["seconds"]["total"][name] for name in ("median", "p10", "p90")}
        spread = [[max(0.0, left - total["p10"])], [max(0.0, total["p90"] - left)]]
        axes.errorbar(left, row, xerr=spread, color="black", capsize=3, linewidth=1)
        axes.annotate(
            f"  {_milliseconds(total['median'])}", (max(left, total["p90"]), row), va="center", fontsize=8
        )
    axes.set_yticks(range(len(case["methods"])), list(case["methods"]))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(f"{case['name']}: {case['describe']}", fontsize=9, loc="left")


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
