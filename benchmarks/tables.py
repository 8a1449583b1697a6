"""Writes the tables of the READMEs and of docs/performance.md from the committed results, between markers.

    python benchmarks/tables.py              writes
    python benchmarks/tables.py --check      exit code 1 where a document does not say what the results say

A document says <!-- table: NAME --> and, below, <!-- end of table -->; NAME is a key of TABLES. Without its
results a table is empty. In a document named *.zh.md the words of a table are Chinese."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from suites import CUDNN, FLASH, FLEX, MASKED, OURS, STAGES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs" / "performance.md")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

# Of tables in a Chinese document: whole cells, and the words of the line below a table.
CHINESE = {
    "Mode": "模式",
    "Q len": "查询长度",
    "K len": "键长度",
    "Window": "窗口",
    "ours ms": "本库 ms",
    "speed-up": "加速比",
    "forward": "前向",
    "backward": "反向",
    "decode": "解码",
}
CHINESE_SOURCE = (
    (r", driver ", "，驱动 "),
    (r", PyTorch ", "，PyTorch "),
    (r", commit ", "，提交 "),
    (r"; medians of (\d+) runs\.$", r"；\1 次运行的中位数。"),
    (r"; medians\.$", "；中位数。"),
)


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def milliseconds(case: dict, method: str, stage: str) -> float | None:
    found = case["methods"].get(method, {}).get("seconds", {}).get(stage)
    return None if found is None else 1e3 * found["median"]


def of_pass(case: dict) -> str:
    return "backward" if case["backward"] else "forward"


def rows_of(title: str, rows: list[list[str]], numbers_from: int) -> list[str]:
    columns = [column.strip() for column in title.split("|")]
    rule = ["---"] * numbers_from + ["---:"] * (len(columns) - numbers_from)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]


def measured_on(report: dict) -> str:
    where, options = report["environment"], report["options"]
    runs = f"medians of {options['runs']} runs" if "runs" in options else "medians"
    driver = f"driver {where['driver']}, " if where.get("driver") else ""
    gpu = where.get("gpu", where["cpu"])
    return f"{gpu}, {driver}PyTorch {where['torch']}, commit `{where['commit']}`; {runs}."


def against_mask(report: dict) -> list[str]:
    rows = []
    for mode in ("length", "window", "decode", "decode_window"):
        cases = [case for case in report["cases"] if mode in case["modes"] and OURS in case["methods"]]
        for case in sorted(cases, key=lambda case: (case["sizes"][4], case["keep_window"])):
            *_, seqlen_q, seqlen_k, _ = case["sizes"]
            ours, mask = (milliseconds(case, method, of_pass(case)) for method in (OURS, MASKED))
            gain = f"{number(mask / ours, 2)}x" if mask else "-"
            name = "decode" if seqlen_q == 1 else of_pass(case)
            sizes = [str(x) for x in (seqlen_q, seqlen_k, case["keep_window"])]
            row = [name, *sizes, number(mask), number(ours), gain]
            if row not in rows:  # a case may belong to two of the tables
                rows.append(row)
    return rows_of("Mode | Q len | K len | Window | SDPA ms | ours ms | speed-up", rows, 1)


def real_shapes(report: dict) -> list[str]:
    rows = []
    for case in report["cases"]:
        if "real" not in case["modes"] or not {OURS, STAGES} <= set(case["methods"]):
            continue
        which, (batch, *_, seqlen_k, _) = of_pass(case), case["sizes"]
        stages = [milliseconds(case, STAGES, stage) for stage in ("select", "plan", which)]
        beside = [milliseconds(case, method, which) for method in (MASKED, CUDNN, FLASH, FLEX)]
        rate = case["methods"][STAGES]["gflops"][which] / 1e3
        memory = (case["methods"][OURS].get("bytes") or {}).get("extra")
        order = (batch, seqlen_k, case["keep_window"], ("iid", "recency", "equal").index(case["score"]))
        cells = [*stages, milliseconds(case, OURS, which), *beside]
        tail = [number(rate), number(memory / 2**20 if memory is not None else None)]
        sizes = map(str, (batch, seqlen_k, case["keep_window"]))
        rows.append((order, [*sizes, case["score"], *map(number, cells), *tail]))
    title = (
        "B | N | w | scores | select | plan | kernel | end to end | SDPA mask | causal cuDNN | causal flash"
    )
    return rows_of(title + " | flex | TFLOP/s | MiB extra", [row for _, row in sorted(rows)], 4)


def figures(report: dict) -> list[str]:
    rows = []
    for figure in report["figures"]:
        if figure["value"] is None:
            rows.append([figure["what"], "not measured", "", "no", figure["detail"]])
            continue
        asked = f"{'at least' if figure['at_least'] else 'at most'} {number(figure['limit'])}"
        asked += f", aim {number(figure['aim'])}" if figure["aim"] else ""
        reached = "yes" if figure["reached"] else "**no**"
        rows.append(
            [figure["what"], f"{number(figure['value'])} {figure['unit']}", asked, reached, figure["detail"]]
        )
    return rows_of("figure | measured | asked | reached | detail", rows, 5)


TABLES: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "forward": ("forward.json", against_mask),
    "backward": ("backward.json", against_mask),
    "real-forward": ("forward.json", real_shapes),
    "real-backward": ("backward.json", real_shapes),
    "figures": ("figures.json", figures),
}


def in_chinese(line: str) -> str:
    if line.startswith("|"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        return "| " + " | ".join(CHINESE.get(cell, cell) for cell in cells) + " |"
    for english, chinese in CHINESE_SOURCE:
        line = re.sub(english, chinese, line)
    return line


def table(name: str, results: Path, chinese: bool = False) -> str:
    file, make = TABLES[name]
    if not (results / file).is_file():
        return ""
    report = json.loads((results / file).read_text())
    lines = [*make(report), "", measured_on(report), ""]
    return "\n".join(map(in_chinese, lines) if chinese else lines)


def filled(text: str, results: Path = RESULTS, chinese: bool = False) -> str:
    """The document with every table made anew."""
    return MARKED.sub(lambda found: found[1] + table(found[2], results, chinese) + found[4], text)


def made_anew(document: Path) -> str:
    return filled(document.read_text(), chinese=document.name.endswith(".zh.md"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if something would change"
    )
    check = parser.parse_args().check
    stale = [document for document in DOCUMENTS if made_anew(document) != document.read_text()]
    for document in stale:
        print(f"{document.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            document.write_text(made_anew(document))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
