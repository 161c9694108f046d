"""Ray Tune's view of a sweep: a searcher, a scheduler and a stopper that ask SweepState, and decide nothing.

Tune runs the trials; what is next, who stops and what is remembered is the sweep's own, because Tune tells
Optuna of pruned trials as if they were complete, and forgets its rungs when it is killed.
"""

import json
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.state import SweepState
from dtr_ray.training import Report

Launch = Callable[[TrialRecord], dict[str, Any]]


class _Unsaved:
    """Leaves nothing in Tune's own files: they are never read, and the sweep's state is on disk already."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SweepSearcher(_Unsaved, Searcher):
    """Hands the sweep's trials to Tune, no more at once than fit the cluster."""

    def __init__(self, state: SweepState, max_concurrent: int, launch: Launch) -> None:
        super().__init__(metric=None, mode=None)
        self._state = state
        self._max_concurrent = max_concurrent
        self._launch = launch
        self.ids: dict[str, str] = {}
        """The sweep's trial ids by Tune's, of trials that Tune is running."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial; None while the cluster is full; FINISHED when no trial is left."""
        if len(self.ids) >= self._max_concurrent:
            return None
        record = self._state.next_trial()
        if record == "finished":
            return Searcher.FINISHED
        assert isinstance(record, TrialRecord)
        self.ids[trial_id] = record.trial_id
        return self._launch(record)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Writes down how the trial ended, if the journal does not say so yet."""
        own_id = self.ids.pop(trial_id, None)
        if own_id is None:
            return
        if error:
            self._state.finish(own_id, "failed", "its process died, more often than failures.retries allows")
        elif result is not None and result.get("done") and "failed" in result:
            self._state.finish(own_id, "failed" if result["failed"] else "completed", result["failed"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is saved at every event."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class SweepScheduler(_Unsaved, FIFOScheduler):
    """Stops a trial when the sweep's early stopping says so."""

    def __init__(self, state: SweepState, searcher: SweepSearcher) -> None:
        super().__init__()
        self._state = state
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Takes the report, and decides."""
        own_id = self._searcher.ids[trial.trial_id]
        report = Report(**json.loads(result["report"]))
        stop = self._state.report(own_id, report, result["wall_s"])
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class SweepStopper(_Unsaved, tune.Stopper):
    """Stops everything when the sweep is to end: budget spent, too many failures, or no progress."""

    def __init__(self, state: SweepState) -> None:
        self._state = state

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the sweep ends now."""
        self._state.check_budget()
        return self._state.ending is not None
