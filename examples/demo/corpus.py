"""The text: the .py files of the standard library of the Python that runs this, as bytes.

A file is held out if the crc32 of its path within the library is divisible by 20, about 6 % of the bytes: the
split is the same on every machine, and a file stays on its side from one Python version to the next. Left out
are tests, bundled packages, and files that are tables rather than code.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SKIPPED = {
    "__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip
START = 0  # the byte before every file; no file contains it
VOCABULARY = 256


class Corpus(NamedTuple):
    training: Tensor  # uint8
    held_out: Tensor
    training_files: int
    held_out_files: int


def load_corpus() -> Corpus:
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED.intersection(name.parts[:-1]) or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        held_out = zlib.crc32(name.as_posix().encode()) % 20 == 0
        parts[held_out].append(bytes([START]) + path.read_bytes())
    training, held_out = (torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8) for files in parts)
    return Corpus(training, held_out, len(parts[0]), len(parts[1]))


def training_batch(text: Tensor, batch_size: int, seqlen: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch_size, seqlen] at random places that depend on seed and step alone."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(len(text) - seqlen, (batch_size,), generator=generator).tolist()
    windows = torch.stack([text[start : start + seqlen + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


def evaluation_windows(text: Tensor, count: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [count, seqlen], evenly over the text without overlap; fewer if it is short."""
    available = (len(text) - 1) // seqlen
    if available == 0:
        raise ValueError(f"--seq-len {seqlen} is longer than the held-out text, {len(text)} bytes")
    chosen = torch.linspace(0, available - 1, min(count, available)).long().tolist()
    windows = torch.stack([text[i * seqlen : (i + 1) * seqlen + 1] for i in chosen]).long()
    return windows[:, :-1], windows[:, 1:]


def bigram_loss(training: Tensor, inputs: Tensor, targets: Tensor, k: float = 0.1) -> float:
    """Nats per byte of P(b | a) = (count(ab) + k) / (count(a) + 256 k), counted in the training text."""
    pairs = training[:-1].long() * VOCABULARY + training[1:]
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY) + k
    log_probability = torch.log(counts / counts.sum(1, keepdim=True))
    return -log_probability[inputs, targets].mean().item()
