"""A progress bar on one line; where the output is not a terminal, a plain line now and then."""

from __future__ import annotations

import sys
import time

WIDTH = 24
LINE_EVERY = 10.0  # seconds, where there is no terminal
DRAW_EVERY = 0.1


class ProgressBar:
    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._drawn = 0.0
        self._length = 0

    def show(self, fraction: float, text: str) -> None:
        now = time.monotonic()
        if now - self._drawn < (DRAW_EVERY if self._terminal else LINE_EVERY):
            return
        self._drawn = now
        if not self._terminal:
            print(f"{fraction:4.0%}  {text}", flush=True)
            return
        full = int(WIDTH * fraction)
        line = f"[{'#' * full}{'.' * (WIDTH - full)}] {fraction:4.0%}  {text}"
        print("\r" + line.ljust(self._length), end="", flush=True)
        self._length = len(line)

    def close(self) -> None:
        if self._terminal and self._length:
            print("\r" + " " * self._length + "\r", end="", flush=True)
            self._length = 0
