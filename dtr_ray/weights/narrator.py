"""Narrator: tells the user of a download, its size and how far it is."""

import sys
import time
from types import TracebackType
from typing import Self

_EVERY_S = 10.0
_EVERY_S_ON_TERMINAL = 0.2


class Narrator:
    """Call it with the bytes that are here and those there will be; silent until it is called.

    On a terminal one line that changes, else a line every ten seconds; on standard error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._started: float | None = None
        self._told = -_EVERY_S
        self._first = self._done = self._total = 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Hears of progress, as often as one likes."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._first = now, done
            self._print(f"fetching {self._what}, {size(total)}", end=False)
        self._done, self._total = done, total
        if now - self._told >= (_EVERY_S_ON_TERMINAL if self._terminal else _EVERY_S):
            if self._told > 0:
                rate = (done - self._first) / max(now - self._started, 1e-3)
                share = f"{done / total:.0%} of {size(total)}" if total else size(done)
                self._print(f"fetching {self._what}: {share}, {size(rate)}/s", end=False)
            self._told = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started is not None:
            seconds = time.monotonic() - self._started
            ended = "fetched" if error is None else "not fetched:"
            self._print(f"{ended} {self._what}, {size(self._done)} in {seconds:.1f} s", end=True)

    def _print(self, text: str, *, end: bool) -> None:
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="\n" if end else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def size(num_bytes: float) -> str:
    """Bytes in words, three digits."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
