"""SweepState: which trials there are, what comes next, and who is stopped. It knows nothing of Ray.

Every change goes to the journal first, then to the Optuna study: a sweep that is killed anywhere goes on
from the journal, and what the study lacks is told to it again.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dtr_ray.config import SweepConfig
from dtr_ray.config.protocol import protocol_of
from dtr_ray.disk import write_durably
from dtr_ray.search.database import public
from dtr_ray.search.figures import Best, Tally
from dtr_ray.search.journal import (
    Journal,
    Status,
    TrialRecord,
    apply,
    failed_before_giving_up,
    is_done,
    replay,
    seconds_spent,
)
from dtr_ray.search.provenance import sweep_identity
from dtr_ray.search.resuming import data_changed
from dtr_ray.search.sharing import open_mirror
from dtr_ray.search.stopping import Standings
from dtr_ray.search.study import Suggester
from dtr_ray.training.reports import Report

Happening = Literal["started", "reported", "retried", "ended"]
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
        """Hear of every trial that starts, reports, is retried or ends, after it is on disk."""
        self.is_cut_off: Callable[[], bool] = lambda: False
        """Whether nobody hears of the trials for the moment, which is no sign that they hang."""
        self._journal = Journal(folder / "journal.jsonl")
        self.trials = replay(self._journal.events)
        proxy = self.evaluation.proxy
        self._standings = Standings(config.early_stopping, 0 if proxy is None else proxy.until_step)
        self.tally = Tally(self.metric)
        """Of all trials, as they are now."""
        for trial in self.trials.values():
            self._count(trial)
        self.done_before = self.complete and is_done(self._journal.events)
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
        self._failed_before = failed_before_giving_up(self._journal.events)
        # What they add up to is in `trials`.
        self._journal.events.clear()
        self._unbooked_s: dict[str, float] = {}
        self._journal.write("start")
        self._started = time.monotonic()
        self.ending: str | None = None
        """Why no further trial is started, once that is so."""
        self.budget_spent = False

    def copy_events(self, copy: Callable[[], None]) -> None:
        """Has `copy` bring the journal to another place too, before any further event takes effect."""
        self._journal.after_write = copy

    @property
    def running(self) -> list[TrialRecord]:
        """Trials that have neither ended nor failed, those not yet placed included."""
        return self.tally.trials("running")

    @property
    def failed(self) -> list[TrialRecord]:
        """Trials that failed."""
        return self.tally.trials("failed")

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
        changed = data_changed(self.trials, trial_id, report)
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

    def retry(self, trial_id: str, reason: str, *, counted: bool) -> None:
        """A trial's process has died, and another goes on with it; not `counted` where it had to move."""
        trial = self.trials[trial_id]
        if trial.status == "running":
            self._apply(self._journal.write("retry", id=trial_id, reason=reason, counted=counted))
            self._tell("retried", trial)

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
        return self.tally.seconds * self.devices_per_trial / 3600

    def end(self, reason: str) -> None:
        """Starts no further trial; the first reason stands."""
        if self.ending is None:
            self.ending = reason

    def best(self) -> Best | None:
        """(trial, step, value) of the best value among trials that did not fail."""
        return self.tally.best

    def ranked(self) -> list[Best]:
        """(trial, step, best value) of all trials that have a value and did not fail, the best first."""
        trials = [t for t in list(self.trials.values()) if t.status != "failed"]
        found = [(trial, *best) for trial in trials if (best := trial.best(self.metric)) is not None]
        return sorted(found, key=lambda row: (row[2], row[0].number))

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
        return len(self.trials) >= self.config.search.num_trials and not self.tally.count("running")

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
        name = self.evaluation.metric_at(report.step)
        value = report.metrics[name]
        num_steps = int(trial.params.get("training.num_steps", self.config.trial.training.num_steps))
        self._standings.add(trial.trial_id, report.step, value)
        error = report.metrics.get(f"{name}_stderr", 0.0)
        return self._standings.reason(trial.trial_id, report.step, value, num_steps, error=error)

    def _count(self, trial: TrialRecord) -> None:
        """Takes a trial that an earlier process has told the journal of."""
        self.tally.update(trial)
        for step, values in trial.reports.items():
            if step and (name := self.evaluation.metric_at(step)) in values:
                self._standings.add(trial.trial_id, step, values[name])

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

    def _started_now(self, trial: TrialRecord) -> TrialRecord:
        self._tell("started", trial)
        return trial

    def _tell(self, happening: Happening, trial: TrialRecord) -> None:
        for listener in self.listeners:
            listener(happening, trial)

    def _apply(self, event: dict[str, Any]) -> None:
        apply(self.trials, event)
        self.tally.update(self.trials[event["id"]])


def save_config(config: SweepConfig, folder: Path) -> None:
    """Keeps the resolved sweep beside its results, without the passwords of its addresses."""
    write_durably(folder / "sweep.json", json.dumps(public(config), indent=2) + "\n")


def is_complete(config: SweepConfig, trials: dict[str, TrialRecord]) -> bool:
    """Whether there is nothing left to run."""
    return len(trials) >= config.search.num_trials and all(t.status != "running" for t in trials.values())
