"""What a run of the suite has checked, counted where it is checked and printed once at the end (conftest.py).

A green run that compared nothing would look like one that compared everything; these numbers tell them apart.
"""

from collections import Counter

LABELS = {
    "tier A": "elements compared exactly with the probe",
    "tier B": "elements within their own bound",
    "tier C": "tensors within their aggregate bound",
    "selection": "expiries equal to the heap's",
    "plan": "plan entries equal to the model's",
    "bitwise": "tensors compared bit for bit",
    "property": "identities checked without a reference",
    "fuzz": "fuzz examples",
    "refusal": "bad calls refused with the right message",
    "bug": "injected bugs caught",
}

counts: Counter = Counter()
worst: dict[str, float] = {}  # by tensor, the largest error as a fraction of its bound
notes: list[str] = []


def count(kind: str, number: int = 1) -> None:
    if kind not in LABELS:
        raise KeyError(kind)
    counts[kind] += number


def record_worst(tensor: str, ratio: float) -> None:
    worst[tensor] = max(worst.get(tensor, 0.0), ratio)


def note(line: str) -> None:
    """A line of its own below the counts."""
    notes.append(line)


def summary() -> list[str]:
    return [f"{counts[kind]:>13,} {label}" for kind, label in LABELS.items() if counts[kind]] + notes
