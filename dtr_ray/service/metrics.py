"""Prometheus metrics of sweeps and trials, through the exporter that every machine of a Ray cluster has.

Ray puts `ray_` before each name. What a process has told drops out of the exporter soon after its end.
"""

import logging
import math
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray.util import metrics as ray_metrics

from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.state import Happening, SweepState

log = logging.getLogger(__name__)

_TELL_EVERY_S = 5.0
# A trial's first figure comes sooner.
_FIRST_S = 0.5
# Of the driver's time, at most, for looking at what waits for MLflow.
_LOOK_SHARE = 0.02


class _Kind(NamedTuple):
    kind: Literal["gauge", "counter"]
    text: str
    tags: tuple[str, ...]


METRICS = {
    "dtr_ray_trials": _Kind("gauge", "Trials by status; `to come` are not started yet.", ("sweep", "status")),
    "dtr_ray_failures": _Kind("counter", "Trials that failed, since the sweep's process began.", ("sweep",)),
    "dtr_ray_best_distance": _Kind("gauge", "Best value of the sweep's metric.", ("sweep", "metric")),
    "dtr_ray_device_hours": _Kind("gauge", "Hours times devices, as of the last reports.", ("sweep",)),
    "dtr_ray_records_waiting": _Kind("gauge", "Records that MLflow has not taken yet.", ("sweep",)),
    "dtr_ray_trial_distance": _Kind(
        "gauge", "Distance last reported, of running trials.", ("sweep", "trial", "metric")
    ),
    "dtr_ray_trial_step": _Kind("gauge", "Training step of running trials.", ("sweep", "trial")),
    "dtr_ray_trial_images_per_s": _Kind(
        "gauge", "Images trained on a second, lately; 0 while it evaluates.", ("sweep", "trial")
    ),
    "dtr_ray_trial_attempt": _Kind(
        "gauge", "1, and one more for each process that died.", ("sweep", "trial")
    ),
}
"""All that is exported, by its name before Ray's prefix."""

_made: dict[str, Any] = {}


def sweep_of(folder: Path) -> str:
    """The `sweep` tag of what runs in a folder: the sweep's name, or `NAME/best` of its `train_best`."""
    nested = not (folder / "sweep.json").exists() and (folder.parent / "sweep.json").exists()
    return f"{folder.parent.name}/{folder.name}" if nested else folder.name


def tell(name: str, value: float, **tags: str) -> None:
    """Sets a gauge of METRICS, or adds to a counter; nothing happens where there is no Ray."""
    if not ray.is_initialized():
        return
    kind = METRICS[name]
    if name not in _made:
        made = ray_metrics.Gauge if kind.kind == "gauge" else ray_metrics.Counter
        _made[name] = made(name, kind.text, kind.tags)
    metric = _made[name]
    if kind.kind == "gauge":
        metric.set(value, tags)
    else:
        metric.inc(value, tags)


class TrialMetrics:
    """What a trial's own process tells of it; cheap enough to be told of every step.

    Ray repeats a gauge's last value as long as the process lives, but exports no NaN: so the series of
    a trial go when it ends, and there are no more of them than trials run at a time.
    """

    def __init__(self, sweep: str, trial: str, batch_size: int, attempt: int) -> None:
        self._tags = {"sweep": sweep, "trial": trial}
        self._batch_size, self._attempt = batch_size, attempt
        self._metric: str | None = None
        self._seen: tuple[float, int] | None = None
        """When it last told, and the step then."""
        self._every_s = _FIRST_S

    def progress(self, step: int) -> None:
        """Hears of each training step, and of each batch of samples while it evaluates."""
        now = time.monotonic()
        if self._seen is None:
            self._seen = (now, step)
        elif now - self._seen[0] < self._every_s:
            return
        since, before = self._seen
        if now > since:
            rate = (step - before) * self._batch_size / (now - since)
            tell("dtr_ray_trial_images_per_s", rate, **self._tags)
            self._seen, self._every_s = (now, step), _TELL_EVERY_S
        tell("dtr_ray_trial_step", step, **self._tags)
        tell("dtr_ray_trial_attempt", self._attempt, **self._tags)

    def evaluated(self, metric: str, value: float) -> None:
        """Hears of the distance of each evaluation, under its own name."""
        if self._metric not in (None, metric):
            tell("dtr_ray_trial_distance", math.nan, metric=str(self._metric), **self._tags)
        self._metric = metric
        tell("dtr_ray_trial_distance", value, metric=metric, **self._tags)

    def close(self) -> None:
        """The trial has ended, or goes on elsewhere: its series go."""
        for name in ("dtr_ray_trial_images_per_s", "dtr_ray_trial_step", "dtr_ray_trial_attempt"):
            tell(name, math.nan, **self._tags)
        if self._metric is not None:
            tell("dtr_ray_trial_distance", math.nan, metric=self._metric, **self._tags)


class SweepMetrics:
    """A listener of the sweep's state, in its driver; tells of the sweep while `exported` lasts."""

    def __init__(self, state: SweepState, records_waiting: Callable[[], int]) -> None:
        self._state, self._sweep = state, state.config.name
        self._records_waiting = records_waiting
        self._best: float | None = None
        self._find_best()

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Notes the best distance, and counts failures."""
        if happening == "reported" and trial.last_step:
            reported = trial.reports[trial.last_step].get(self._state.metric)
            if reported is not None:
                self._best = reported if self._best is None else min(self._best, reported)
        elif happening == "ended" and trial.status == "failed":
            tell("dtr_ray_failures", 1, sweep=self._sweep)
            # Its figures do not count any more.
            self._find_best()

    def tell(self) -> None:
        """Tells all gauges but that of the records, which takes longer."""
        sweep, state = self._sweep, self._state
        trials = list(state.trials.values())
        counts: Mapping[str, int] = Counts(trial.status for trial in trials)
        for status in ("running", "completed", "pruned", "failed"):
            tell("dtr_ray_trials", counts.get(status, 0), sweep=sweep, status=status)
        to_come = max(0, state.config.search.num_trials - len(trials))
        tell("dtr_ray_trials", to_come, sweep=sweep, status="to come")
        hours = sum(trial.wall_s for trial in trials) * state.devices_per_trial / 3600
        tell("dtr_ray_device_hours", hours, sweep=sweep)
        if self._best is not None:
            tell("dtr_ray_best_distance", self._best, sweep=sweep, metric=state.metric)

    def run(self, done: threading.Event) -> None:
        """Tells, every few seconds, until `done`; what waits for MLflow is counted while that is cheap."""
        waiting, look_at = 0, 0.0
        while True:
            self.tell()
            started = time.monotonic()
            if started >= look_at:
                try:
                    waiting = self._records_waiting()
                except OSError as error:
                    log.warning("the records that wait for MLflow cannot be counted: %s", error)
                look_at = time.monotonic() + (time.monotonic() - started) / _LOOK_SHARE
            tell("dtr_ray_records_waiting", waiting, sweep=self._sweep)
            if done.wait(_TELL_EVERY_S):
                return

    def _find_best(self) -> None:
        best = self._state.best()
        self._best = None if best is None else best[2]


@contextmanager
def exported(state: SweepState, records_waiting: Callable[[], int]) -> Iterator[None]:
    """Exports the sweep's metrics meanwhile; `records_waiting` counts what MLflow has not taken."""
    metrics, done = SweepMetrics(state, records_waiting), threading.Event()
    state.listeners.append(metrics)
    thread = threading.Thread(target=metrics.run, args=(done,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_TELL_EVERY_S)
        state.listeners.remove(metrics)
