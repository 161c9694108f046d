"""What a sweep leaves behind: best.json and trials.csv, brought up to date whenever a trial ends."""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

from dtr_ray.config.protocol import describe
from dtr_ray.config.space import target
from dtr_ray.disk import write_durably
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.state import Happening, SweepState

# A longer table is not written at every trial's end, but takes at most this share of the driver's time.
_SHORT_TABLE, _WRITE_SHARE = 500, 0.02
_HIGHER_IS_BETTER = ("is_", "precision_", "recall_", "train_seconds", "eval_seconds")


class ResultFiles:
    """A listener of the state: a sweep that is killed has left its results so far.

    From 500 trials on `trials.csv` is not written more often than takes 2% of the time: it may lag behind by
    fifty times what writing it takes, and then until the next report.
    """

    def __init__(self, state: SweepState) -> None:
        self._state = state
        self._table = _Table(state)
        self._is_behind = False
        self._write_at = 0.0
        self._best: tuple[str, int, float] | None = None

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Writes the results when a trial has ended."""
        self._is_behind |= happening == "ended"
        started = time.monotonic()
        if self._is_behind and (started >= self._write_at or len(self._state.trials) < _SHORT_TABLE):
            self._table.write()
            now = time.monotonic()
            self._is_behind, self._write_at = False, now + (now - started) / _WRITE_SHARE
        if happening == "ended":
            best = self._state.best()
            found = None if best is None else (best[0].trial_id, *best[1:])
            if found != self._best:
                write_best(self._state, None)
                self._best = found


def write_best(state: SweepState, mlflow_run_id: str | None) -> dict[str, Any] | None:
    """Writes `best.json`, the best trial with its resolved configuration and what its figure measures.

    None while no trial has a value of the full metric; a proxy's is none.
    """
    best = state.best()
    if best is None:
        return None
    trial, step, value = best
    content = {
        "trial_id": trial.trial_id,
        "metric": state.metric,
        "mode": "min",
        "value": value,
        "standard_error": trial.reports[step].get(f"{state.metric}_stderr"),
        "step": step,
        "protocol": trial.protocols[step],
        "config": state.config.trial_config(trial.params).to_dict(),
        "checkpoint": (Path("trials") / trial.trial_id / trial.checkpoints[step]).as_posix(),
        "mlflow_run_id": mlflow_run_id,
    }
    write_durably(state.folder / "best.json", json.dumps(content, indent=2) + "\n")
    return content


def write_trials(state: SweepState) -> None:
    """Writes `trials.csv`: one row a trial, with the last and the best value of every reported metric.

    A parameter is empty where the trial does not have it, and the metric where it has reported its proxy
    alone; `reason` says why a trial was stopped or failed, `protocol` what its last figure measures.
    """
    _Table(state).write()


class _Table:
    """`trials.csv`; of thousands of rows only those of trials that have changed are made anew."""

    def __init__(self, state: SweepState) -> None:
        self._state = state
        self._params = list(dict.fromkeys(target(key) for key in state.config.space))
        self._names: list[str] = []
        self._rows: dict[str, tuple[Any, str]] = {}

    def write(self) -> None:
        """Brings the file up to date."""
        records = list(self._state.trials.values())
        changed = [r for r in records if self._rows.get(r.trial_id, (None, ""))[0] != _version(r)]
        names = sorted({*self._names, *(name for r in changed for v in r.reports.values() for name in v)})
        if names != self._names:
            self._names, changed = names, records
        heads = [f"{name}.{which}" for name in names for which in ("last", "best")]
        rest = ["wall_seconds", "device_seconds", "retries", "protocol", "reason"]
        columns = ["id", "status", "steps", *self._params, *heads, *rest]
        for record in changed:
            line = _line(columns, _row(self._state, record, names))
            self._rows[record.trial_id] = (_version(record), line)
        head = _line(columns, dict(zip(columns, columns, strict=True)))
        rows = (self._rows[record.trial_id][1] for record in records)
        write_durably(self._state.folder / "trials.csv", "".join((head, *rows)))


def _version(record: TrialRecord) -> tuple[Any, ...]:
    """Something that changes with the trial."""
    return record.status, len(record.reports), record.wall_s, record.retries, record.reason


def _line(columns: list[str], row: dict[str, Any]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerow(row)
    return text.getvalue()


def _row(state: SweepState, record: TrialRecord, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.trial_id, "status": record.status, "steps": record.last_step}
    row |= record.params
    for name in names:
        # The untrained model's value is no result of the trial.
        reported = {s: values[name] for s, values in record.reports.items() if s and name in values}
        if reported:
            best = reported[_best_step(record, name)]
            row[f"{name}.last"], row[f"{name}.best"] = reported[max(reported)], best
    row["wall_seconds"] = round(record.wall_s, 2)
    row["device_seconds"] = round(record.wall_s * state.devices_per_trial, 2)
    row["retries"] = record.retries
    row["protocol"] = describe(record.protocols[record.last_step]) if record.last_step else ""
    row["reason"] = record.reason
    return row


def _best_step(record: TrialRecord, name: str) -> int:
    """Where a trial has its best value of a metric; of a standard error, where its metric has."""
    name = name.removesuffix("_stderr")
    reported = {s: values[name] for s, values in record.reports.items() if s and name in values}
    best = max if name.startswith(_HIGHER_IS_BETTER) else min
    return best(reported, key=lambda step: reported[step])
