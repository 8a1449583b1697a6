"""Draws the figures of docs/integration.md from selections and plans that are computed here.

    python scripts/draw_figures.py                   writes docs/figures/*.svg
    python scripts/draw_figures.py --check           exit code 1 where one is missing or out of date
    python scripts/draw_figures.py --format png --out DIRECTORY

Selections are those of the installed library, plans those of tests/python/plan_model.py, which the kernels'
plans equal entry for entry. A figure carries a digest of what it shows and of the program that drew it; that
is what --check compares, since the bytes of a figure depend on the versions of matplotlib and its libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
from figures import common, dense, intervals, plans

PROGRAM = Path(__file__).parent
DRAWINGS = {
    "mask": intervals.mask,
    "tiles": intervals.tiles,
    "plan": plans.plan,
    "forward": plans.forward,
    "backward": plans.backward,
    "dense": dense.dense,
}


def digest(data: list[np.ndarray]) -> str:
    found = hashlib.sha256()
    for source in (PROGRAM / "draw_figures.py", *sorted(PROGRAM.glob("figures/*.py"))):
        found.update(source.read_bytes())
    for array in data:
        found.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=common.ROOT / "docs" / "figures", help="default: docs/figures"
    )
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument(
        "--check", action="store_true", help="draw nothing; exit code 1 if something would change"
    )
    arguments = parser.parse_args()
    stale = 0
    for name, draw in DRAWINGS.items():
        figure, data = draw()
        path = arguments.out / f"{name}.{arguments.format}"
        if arguments.check:
            if not path.is_file() or digest(data) not in path.read_text():
                print(f"{path} is out of date")
                stale = 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Description": digest(data), "Creator": None, "Date": None}
        figure.savefig(path, dpi=200, metadata=metadata if arguments.format == "svg" else None)
        common.plt.close(figure)
    return stale


if __name__ == "__main__":
    sys.exit(main())
