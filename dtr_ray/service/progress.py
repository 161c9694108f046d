"""The progress of one long training on the terminal: a bar, or plain lines where there is no terminal."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dtr_ray import log_lines
from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.search.names import figure
from dtr_ray.service.attempts import read_heartbeat
from dtr_ray.service.display import clock
from dtr_ray.training import Report

_LOOK_S = 0.5
_LINE_EVERY_S = 15.0


class TrainingProgress:
    """Follows a run by its heartbeat while the caller waits for reports; use as a context manager."""

    def __init__(
        self, folder: Path, num_steps: int, evaluation: EvaluationConfig, console: Console | None = None
    ) -> None:
        self._folder = folder
        self._num_steps = num_steps
        self._evaluation = evaluation
        self._console = console or Console(file=sys.stdout)
        self._value = ""
        self._first: tuple[float, int] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()
        # A resumed run's old heartbeat says nothing about this one.
        self._beat_before = read_heartbeat(folder).get("time", 0.0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rest]}"), TimeElapsedColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=self._num_steps, rest="")
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def report(self, report: Report) -> None:
        """Shows an evaluation."""
        metric = self._evaluation.metric_at(report.step)
        self._value = f"{metric} {figure(report.metrics, metric)} at step {report.step}"
        if self._bar is None:
            text = f"step {report.step}/{self._num_steps}: {metric} {figure(report.metrics, metric)}"
            with log_lines.about(event="reported", metric=metric, value=report.metrics[metric]):
                self._say(report.step, text)

    def _follow(self) -> None:
        told = time.monotonic()
        while not self._done.wait(_LOOK_S):
            beat = read_heartbeat(self._folder)
            if beat.get("time", 0.0) <= self._beat_before:
                continue
            step, phase = int(beat["step"]), str(beat["phase"])
            left = self._seconds_left(step)
            rest = ", ".join(text for text in (self._value, f"{clock(left)} left" if left else "") if text)
            if self._bar is not None:
                self._bar.update(self._task, completed=step, description=phase, rest=rest)
            elif time.monotonic() - told >= _LINE_EVERY_S:
                told = time.monotonic()
                self._say(step, f"step {step}/{self._num_steps}, {phase}" + (f"; {rest}" if rest else ""))

    def _seconds_left(self, step: int) -> float | None:
        """Time to the last step at the pace since the first one seen, evaluations included."""
        now = time.monotonic()
        if step == 0:
            return None
        if self._first is None:
            self._first = (now, step)
        since, before = self._first
        return None if step <= before else (now - since) / (step - before) * (self._num_steps - step)

    def _say(self, step: int, text: str) -> None:
        line = f"[{clock(time.monotonic() - self._started)}] {text}"
        with log_lines.about(trial=self._folder.name, step=step):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
