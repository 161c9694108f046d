"""SweepState: which trials there are, what comes next, and who is stopped. It knows nothing of Ray.

Every change goes to the journal first, then to the Optuna study: a sweep that is killed anywhere goes on
from the journal, and what the study lacks is told to it again.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dtr_ray.config import SweepConfig
from dtr_ray.config.protocol import protocol_of
from dtr_ray.search.database import public
from dtr_ray.search.figures import Figures
from dtr_ray.search.journal import Journal, Status, TrialRecord, apply, replay, seconds_spent
from dtr_ray.search.provenance import sweep_identity
from dtr_ray.search.sharing import open_mirror
from dtr_ray.search.stopping import should_stop
from dtr_ray.search.study import Suggester
from dtr_ray.training.reports import Report

Happening = Literal["started", "reported", "ended"]
Listener = Callable[[Happening, TrialRecord], None]


class SweepState:
    """All trials of a sweep, kept on disk."""

    def __init__(self, config: SweepConfig, folder: Path, data_identity: str | None = None) -> None:
        """Opens or starts the sweep in `folder`; `data_identity` is its images', where known."""
        self.config = config
        self.folder = folder
        self.metric = config.objective
        self.evaluation = config.trial.evaluation
        """How all trials are measured; `metric_at` names the figure that decides at a step."""
        self.listeners: list[Listener] = []
        """Hear of every trial that starts, reports or ends, after it is on disk."""
        self._figures = Figures(self.evaluation, self.metric)
        self._journal = Journal(folder / "journal.jsonl")
        self.trials = replay(self._journal.events)
        self.done_before = self.complete and _is_done(self._journal.events)
        """Whether the sweep was complete, with all results written, before this process."""
        self._requeue = self.running
        self.protocol = self._book_protocol(data_identity)
        """What the figures of all trials measure."""
        self._suggester = Suggester(config.search, config.space, self.evaluation)
        self._mirror, self._shared = open_mirror(
            config, folder, sweep_identity(folder), self.protocol, self._suggester
        )
        self._mirror.update(self.trials)
        self._seconds_before = seconds_spent(self._journal.events)
        self._failed_before = _failed_before_giving_up(self._journal.events)
        self._unbooked_s: dict[str, float] = {}
        self._journal.write("start")
        self._started = time.monotonic()
        self.ending: str | None = None
        """Why no further trial is started, once that is so."""
        self.budget_spent = False

    @property
    def running(self) -> list[TrialRecord]:
        """Trials that have neither ended nor failed, those not yet placed included."""
        return [t for t in self.trials.values() if t.status == "running"]

    @property
    def failed(self) -> list[TrialRecord]:
        """Trials that failed."""
        return [t for t in self.trials.values() if t.status == "failed"]

    @property
    def seconds(self) -> float:
        """Wall seconds spent, those before a restart included."""
        return self._seconds_before + time.monotonic() - self._started

    def next_trial(self) -> TrialRecord | Literal["finished", "wait"]:
        """The trial to run next: first those that a killed sweep left running, then new ones.

        "wait" where a study that sweeps share is away for the moment.
        """
        if self.ending is None and self._requeue:
            return self._started_now(self._requeue.pop(0))
        if self.ending is not None or len(self.trials) >= self.config.search.num_trials:
            return "finished"
        number = len(self.trials)
        trial_id = f"t{number:04d}"
        if self._shared is None:
            params = self._suggester.suggest(number, self.trials)
        else:
            drawn = self._shared.next_params(trial_id, number, self.trials)
            if drawn == "wait" or drawn == "finished":
                return drawn
            params = drawn
            self._mirror.catch_up(self.trials)
        self._apply(self._journal.write("trial", id=trial_id, number=number, params=params))
        trial = self.trials[trial_id]
        self._mirror.update(self.trials, trial)
        return self._started_now(trial)

    def report(self, trial_id: str, report: Report, seconds: float = 0.0) -> str | None:
        """Takes a trial's report and decides: why it stops, or None when it goes on.

        A report that is known already (a resumed trial repeats its own) changes nothing. One of other images
        than those of the reports before is not taken, and ends the sweep. `seconds` are those since the
        trial's last report, or since its process began with it.
        """
        trial = self.trials[trial_id]
        changed = self._data_changed(trial_id, report)
        if changed is not None:
            self.end(changed)
            return changed
        self._unbooked_s[trial_id] = self._unbooked_s.get(trial_id, 0.0) + seconds
        if report.step not in trial.reports:
            event = {
                "metrics": report.metrics,
                "protocol": report.protocol,
                "checkpoint": report.checkpoint,
                "wall_s": trial.wall_s + self._unbooked_s.pop(trial_id),
                "stop": self._decide(trial, report),
            }
            self._apply(self._journal.write("report", id=trial_id, step=report.step, **event))
            self._mirror.update(self.trials, trial)
            self._tell("reported", trial)
            if trial.status == "pruned":
                self._tell("ended", trial)
        return trial.reason if trial.status == "pruned" else None

    def finish(self, trial_id: str, status: Status, reason: str = "", seconds: float = 0.0) -> None:
        """Ends a trial; one that has ended already stays as it is. `seconds` as in `report`."""
        trial = self.trials[trial_id]
        if trial.status != "running":
            return
        wall_s = trial.wall_s + self._unbooked_s.pop(trial_id, 0.0) + seconds
        self._apply(self._journal.write("end", id=trial_id, status=status, reason=reason, wall_s=wall_s))
        self._mirror.update(self.trials, trial)
        self._tell("ended", trial)
        failed = [t for t in self.failed if t.trial_id not in self._failed_before]
        limit = self.config.failures.max_failed_trials
        if len(failed) > limit and self.ending is None:
            reasons = "; ".join(sorted({t.reason for t in failed}))
            self.end(f"{len(failed)} trials failed, more than failures.max_failed_trials {limit}: {reasons}")
            self._journal.write("give_up", reason=self.ending)

    def check_budget(self) -> None:
        """Ends the sweep when its hours are spent."""
        budget = self.config.budget
        if budget.max_hours is not None and self.seconds / 3600 > budget.max_hours:
            self._spend(f"the budget of {budget.max_hours:g} hours is spent")
        if budget.max_device_hours is not None and self.device_hours > budget.max_device_hours:
            self._spend(f"the budget of {budget.max_device_hours:g} device-hours is spent")

    def _spend(self, reason: str) -> None:
        self.budget_spent = self.budget_spent or self.ending is None
        self.end(reason)

    @property
    def devices_per_trial(self) -> float:
        """GPUs of a trial, or its workers where there is no GPU."""
        resources = self.config.resources
        return resources.workers_per_trial * (resources.gpus_per_worker or 1.0)

    @property
    def device_hours(self) -> float:
        """Hours times devices of all trials, as of their last reports."""
        return sum(t.wall_s for t in self.trials.values()) * self.devices_per_trial / 3600

    def end(self, reason: str) -> None:
        """Starts no further trial; the first reason stands."""
        if self.ending is None:
            self.ending = reason

    def best(self) -> tuple[TrialRecord, int, float] | None:
        """(trial, step, value) of the best value among trials that did not fail."""
        row = min(self._scored(), key=lambda row: row[:2], default=None)
        return None if row is None else (row[3], row[2], row[0])

    def ranked(self) -> list[tuple[TrialRecord, int, float]]:
        """(trial, step, best value) of all trials that have a value and did not fail, the best first."""
        found = sorted(self._scored(), key=lambda row: row[:2])
        return [(trial, step, value) for value, _, step, trial in found]

    def _scored(self) -> list[tuple[float, int, int, TrialRecord]]:
        """(best value, number, step, trial) of all trials that have a value and did not fail."""
        return [
            (best[1], trial.number, best[0], trial)
            for trial in list(self.trials.values())
            if trial.status != "failed" and (best := self._figures.best(trial)) is not None
        ]

    @property
    def untrained_value(self) -> float | None:
        """The metric (or its proxy, where there is one) of an untrained model, once it is known."""
        name = self.evaluation.metric_at(0)
        found = (t.reports[0][name] for t in self.trials.values() if 0 in t.reports)
        return next(found, None)

    def trial_folder(self, trial_id: str) -> Path:
        """Where a trial keeps its checkpoints, grids and reports."""
        return self.folder / "trials" / trial_id

    @property
    def complete(self) -> bool:
        """Whether every trial has ended and no new one is left."""
        return is_complete(self.config, self.trials)

    def mark_done(self) -> None:
        """Notes that the results of a complete sweep are written."""
        if not self.done_before:
            self._journal.write("done")

    def close(self) -> None:
        """Notes that this process has left the sweep, and closes the journal."""
        self._mirror.catch_up(self.trials)
        self._journal.write("stop")
        self._journal.close()

    def _decide(self, trial: TrialRecord, report: Report) -> str | None:
        """Why early stopping ends the trial after this report, or None."""
        if report.step == 0:
            return None
        histories = {t.trial_id: self._figures.history(t) for t in self.trials.values() if t.reports}
        name, proxy = self.evaluation.metric_at(report.step), self.evaluation.proxy
        histories[trial.trial_id] = {**self._figures.history(trial), report.step: report.metrics[name]}
        return should_stop(
            self.config.early_stopping,
            trial.trial_id,
            report.step,
            histories,
            int(trial.params.get("training.num_steps", self.config.trial.training.num_steps)),
            error=report.metrics.get(f"{name}_stderr", 0.0),
            proxy_until=0 if proxy is None else proxy.until_step,
        )

    def _book_protocol(self, data_identity: str | None) -> dict[str, Any]:
        """Notes what the figures measure, and of which images; the first note of these stands."""
        noted = [event["protocol"] for event in self._journal.events if event["event"] == "protocol"]
        before = noted[-1] if noted else {}
        identity = before.get("data.identity") or data_identity
        trial, has_proxy = self.config.trial, self.evaluation.proxy is not None
        protocol = protocol_of(trial, identity)
        if protocol != before:
            proxy = protocol_of(trial, identity, proxy=True) if has_proxy else None
            self._journal.write("protocol", protocol=protocol, proxy=proxy)
        return protocol

    def _data_changed(self, trial_id: str, report: Report) -> str | None:
        """In words how the images of a report differ from those of the reports before, or None."""
        known = (p.get("data.identity") for t in self.trials.values() for p in t.protocols.values())
        before, now = next(filter(None, known), None), report.protocol.get("data.identity")
        if before is None or now in (None, before):
            return None
        return (
            f"the images have changed: {trial_id} was evaluated at step {report.step} on {now}, those before "
            f"on {before}; put the same files (names, sizes, times) on all machines, and --resume"
        )

    def _started_now(self, trial: TrialRecord) -> TrialRecord:
        self._tell("started", trial)
        return trial

    def _tell(self, happening: Happening, trial: TrialRecord) -> None:
        for listener in self.listeners:
            listener(happening, trial)

    def _apply(self, event: dict[str, Any]) -> None:
        apply(self.trials, event)


def save_config(config: SweepConfig, folder: Path) -> None:
    """Keeps the resolved sweep beside its results, without the passwords of its addresses."""
    path = folder / "sweep.json"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(public(config), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def is_complete(config: SweepConfig, trials: dict[str, TrialRecord]) -> bool:
    """Whether there is nothing left to run."""
    return len(trials) >= config.search.num_trials and all(t.status != "running" for t in trials.values())


def _is_done(events: list[dict[str, Any]]) -> bool:
    own = [event["event"] for event in events if event["event"] not in ("start", "stop", "protocol")]
    return own[-1:] == ["done"]


def _failed_before_giving_up(events: list[dict[str, Any]]) -> set[str]:
    """Trials that had failed when the sweep last gave up: a resumed one does not give up for them again."""
    gave_up = max((n for n, event in enumerate(events) if event["event"] == "give_up"), default=0)
    return {e["id"] for e in events[:gave_up] if e["event"] == "end" and e["status"] == "failed"}
