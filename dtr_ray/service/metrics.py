"""Prometheus metrics of sweeps and trials, through the exporter that every machine of a Ray cluster has.

Ray puts `ray_` before each name. A gauge is told again every few seconds by the process that knows it, and
drops out of the exporter soon after that has ended: only running trials have series of their own.
"""

import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray.util import metrics as ray_metrics

from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.state import Happening, SweepState

_TELL_EVERY_S = 5.0
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
    "dtr_ray_trial_distance": _Kind("gauge", "Distance last reported.", ("sweep", "trial", "metric")),
    "dtr_ray_trial_step": _Kind("gauge", "Training step.", ("sweep", "trial")),
    "dtr_ray_trial_images_per_s": _Kind(
        "gauge", "Images trained on a second, lately; 0 while it evaluates.", ("sweep", "trial")
    ),
    "dtr_ray_trial_attempt": _Kind("gauge", "1, and one more for each process that died.", ("sweep", "trial")),
}
"""All that is exported, by its name before Ray's prefix."""

_made: dict[str, Any] = {}


def sweep_of(folder: Path) -> str:
    """The `sweep` tag of what runs in a folder: the sweep's name; that of a `train_best` follows its sweep's."""
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
    """What a trial's own process tells of it; cheap enough to be told of every step."""

    def __init__(self, sweep: str, trial: str, batch_size: int, attempt: int) -> None:
        self._tags = {"sweep": sweep, "trial": trial}
        self._batch_size, self._attempt = batch_size, attempt
        self._seen: tuple[float, int] | None = None
        """When it last told, and the step then."""

    def progress(self, step: int) -> None:
        """Hears of each training step, and of each batch of samples while it evaluates."""
        now = time.monotonic()
        if self._seen is None:
            self._seen = (now, step)
        elif now - self._seen[0] < _TELL_EVERY_S:
            return
        since, before = self._seen
        if now > since:
            rate = (step - before) * self._batch_size / (now - since)
            tell("dtr_ray_trial_images_per_s", rate, **self._tags)
            self._seen = (now, step)
        tell("dtr_ray_trial_step", step, **self._tags)
        tell("dtr_ray_trial_attempt", self._attempt, **self._tags)


class SweepMetrics:
    """A listener of the sweep's state, in its driver; tells of the sweep while `exported` lasts."""

    def __init__(self, state: SweepState, records_waiting: Callable[[], int]) -> None:
        self._state, self._sweep = state, state.config.name
        self._records_waiting = records_waiting
        self._distances: dict[str, tuple[str, float]] = {}
        """By running trial: the metric and value of its last report. Replaced, never changed, since another
        thread reads it."""
        self._best: float | None = None
        for trial in state.running:
            self._note(trial)
        self._note_best()

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Notes what a trial has reported; one that has ended drops out."""
        if happening == "reported":
            self._note(trial)
            self._note_best()
        elif happening == "ended":
            self._distances = {t: d for t, d in self._distances.items() if t != trial.trial_id}
            if trial.status == "failed":
                tell("dtr_ray_failures", 1, sweep=self._sweep)

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
        for trial_id, (metric, value) in self._distances.items():
            tell("dtr_ray_trial_distance", value, sweep=sweep, trial=trial_id, metric=metric)
        if self._best is not None:
            tell("dtr_ray_best_distance", self._best, sweep=sweep, metric=state.metric)

    def run(self, done: threading.Event) -> None:
        """Tells, every few seconds, until `done`; what waits for MLflow is looked at as often as it is cheap."""
        waiting, look_at = 0, 0.0
        while True:
            self.tell()
            started = time.monotonic()
            if started >= look_at:
                waiting = self._records_waiting()
                look_at = time.monotonic() + (time.monotonic() - started) / _LOOK_SHARE
            tell("dtr_ray_records_waiting", waiting, sweep=self._sweep)
            if done.wait(_TELL_EVERY_S):
                return

    def _note(self, trial: TrialRecord) -> None:
        if trial.reports and trial.status == "running":
            metric = self._state.evaluation.metric_at(trial.last_step)
            self._distances = self._distances | {
                trial.trial_id: (metric, trial.reports[trial.last_step][metric])
            }

    def _note_best(self) -> None:
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
