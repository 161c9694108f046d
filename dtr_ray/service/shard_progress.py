"""The progress of a preparation on the terminal: a bar, or sparse lines where there is no terminal."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dtr_ray.service.display import clock

_LINE_EVERY_S = 15.0
_PACE_OVER_S = 60.0


class ShardProgress:
    """Shows how much of a number of things is done, how fast, and the time left; a context manager."""

    def __init__(self, what: str, total: int, done: int, console: Console | None = None) -> None:
        """`what` is counted (`images`); `done` of `total` were before this process."""
        self._what = what
        self._total = total
        self._console = console or Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = self._told = time.monotonic()
        self._seen = [(self._started, done)]

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                TextColumn("{task.fields[rest]}"), TimeElapsedColumn(), console=self._console,
            )  # fmt: skip
            done = self._seen[0][1]
            self._task = self._bar.add_task(self._what, total=self._total, completed=done, rest="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._say()

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of all are; `note` is added."""
        now = time.monotonic()
        self._seen.append((now, done))
        # The pace of the last minute: a first shard that loads its models says little.
        while len(self._seen) > 2 and now - self._seen[1][0] > _PACE_OVER_S:
            self._seen.pop(0)
        if self._bar is not None:
            rest = ", ".join(filter(None, [self._pace(), note]))
            self._bar.update(self._task, completed=done, rest=rest)
        elif now - self._told >= _LINE_EVERY_S:
            self._told = now
            self._say(note)

    def _pace(self) -> str:
        (since, before), (now, done) = self._seen[0], self._seen[-1]
        if done <= before or now <= since:
            return ""
        pace = (done - before) / (now - since)
        left = (self._total - done) / pace
        return f"{pace:.3g} {self._what}/s" + (f", {clock(left)} left" if left >= 1 else "")

    def _say(self, note: str = "") -> None:
        done = self._seen[-1][1]
        rest = "; ".join(filter(None, [self._pace(), note]))
        line = f"[{clock(time.monotonic() - self._started)}] {done:,} of {self._total:,} {self._what}"
        line += f", {rest}" if rest else ""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
