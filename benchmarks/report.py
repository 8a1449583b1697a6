"""What a measured case looks like on the terminal: a row of a table."""

from __future__ import annotations

from suites import CUDNN, DENSE, FLASH, FLEX, MASKED, OURS, STAGES

COLUMNS = (
    ("select", STAGES, "select"),
    ("plan", STAGES, "plan"),
    ("kernel", STAGES, "{pass}"),
    ("end to end", OURS, "{pass}"),
    ("mask", MASKED, "{pass}"),
    ("its making", MASKED, "mask"),
    ("causal", DENSE, "{pass}"),
    ("cuDNN", CUDNN, "{pass}"),
    ("flash", FLASH, "{pass}"),
    ("flex", FLEX, "{pass}"),
)
HEADER = (
    f"{'case':>52} "
    + " ".join(f"{title:>10}" for title, *_ in COLUMNS)
    + "  MB extra  TFLOP/s  gain over mask"
)
LEGEND = (
    "Milliseconds, medians. kernel: forward or backward of a given plan; end to end: the public function, of "
    "a backward\nautograd's; mask: SDPA with the dense mask, its making in the next column; causal, cuDNN, "
    "flash: SDPA over all keys; flex: FlexAttention with the interval mask, made within. MB extra: peak "
    "beyond the inputs. TFLOP/s: useful ones of the kernel."
)


def milliseconds(entry: dict, method: str, stage: str) -> float | None:
    """Of the case's pass, where stage is "{pass}"."""
    stage = stage.replace("{pass}", "backward" if entry["backward"] else "forward")
    found = entry["methods"].get(method, {}).get("seconds", {}).get(stage)
    return None if found is None else 1e3 * found["median"]


def row(entry: dict) -> str:
    def cell(value: float | None, width: int = 10) -> str:
        digits = "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"
        return f"{digits:>{width}}"

    cells = [cell(milliseconds(entry, method, stage)) for _, method, stage in COLUMNS]
    memory = (entry["methods"].get(OURS, {}).get("bytes") or {}).get("extra")
    which = "backward" if entry["backward"] else "forward"
    rate = entry["methods"].get(STAGES, {}).get("gflops", {}).get(which)
    ours, mask = (milliseconds(entry, method, "{pass}") for method in (OURS, MASKED))
    gain = mask / ours if ours and mask else None
    cells += [cell(memory / 1e6 if memory is not None else None, 9), cell(rate / 1e3 if rate else None, 8)]
    return f"{entry['name']:>52} {' '.join(cells)} {cell(gain, 8)}"


def print_case(entry: dict, entries: list[dict]) -> None:
    print(row(entry), flush=True)
    said = {item for other in entries[:-1] for item in other["not_run"].items()}
    for name, reason in entry["not_run"].items():
        if (name, reason) not in said:  # once; the file has it with every case
            print(f"{'':>52} {name}: unavailable: {reason}")
    ours = entry["methods"].get(OURS)
    half = next((e["methods"].get(OURS) for e in entries if e["name"] == entry["half"]), None)
    if ours and half:
        ratio = ours["seconds"]["total"]["median"] / half["seconds"]["total"]["median"]
        print(f"{'':>52} {ratio:.2f} times the time of {entry['half']}, half as long")
