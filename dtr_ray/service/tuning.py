"""Ray Tune's part in a sweep: it runs trials, and asks SweepState what is next and who stops.

Tune decides nothing and remembers nothing, because it tells Optuna of pruned trials as if they were
complete, and forgets its rungs when it is killed.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from dtr_ray import log_lines
from dtr_ray.config import SweepConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.disk import make_folder_durably, write_durably
from dtr_ray.search.journal import Status, TrialRecord
from dtr_ray.search.state import SweepState
from dtr_ray.service.claims import Sharing
from dtr_ray.service.deaths import Deaths
from dtr_ray.service.fetching import settled
from dtr_ray.service.trial import SweepTrial
from dtr_ray.training import Report

Launch = Callable[[TrialRecord], dict[str, Any]]

_ENVIRONMENT = {
    # Ctrl-C ends the sweep at once: all there is to save is on disk.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune writes its own state every so often; the journal makes it superfluous.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_DEFAULT_ENVIRONMENT = {
    # Ray Train asks its workers for news this often, and so takes this long to see that they are done.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # We look ourselves (`draining`): Ray Train waits until the machine is gone, and takes a process a trial.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def run_trials(
    config: SweepConfig,
    state: SweepState,
    num_concurrent: int,
    hung: dict[str, str] | None = None,
    store: dict[str, Any] | None = None,
) -> None:
    """Lets Ray Tune run trials, `num_concurrent` at a time, until the state has no more or ends.

    `hung` is the watchdog's, see there; `store` what trials are told of the store that they keep themselves
    in, if they do.
    """
    _prepare(num_concurrent)
    scratch = state.folder / ".ray"
    shutil.rmtree(scratch, ignore_errors=True)
    deaths = Deaths(state, {} if hung is None else hung)
    searcher = SweepSearcher(state, num_concurrent, _launcher(config, state, store), deaths)
    tuner = tune.Tuner(
        tune.with_resources(SweepTrial, tune.PlacementGroupFactory([_need(config.resources)])),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=SweepScheduler(state, searcher), num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch.resolve()),
            stop=SweepStopper(state),
            failure_config=tune.FailureConfig(max_failures=config.failures.retries),
            callbacks=[_Retries(state, searcher)],
            # Trials keep their own; Tune would want a folder that all machines share.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with Sharing(config, num_concurrent, partial(print, config.name, flush=True)) as searcher.sharing:
        tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)


def _prepare(num_concurrent: int) -> None:
    """Sets what Tune reads from the environment, and quietens it."""
    os.environ.update(_ENVIRONMENT, TUNE_MAX_PENDING_TRIALS_PG=str(num_concurrent))
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Tune hands them on to its trials in a way that Ray's agent writes into its log, values and all. Machines
    # have their own, and the processes of this one inherit them.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update({n for n in os.environ if n.startswith("AWS_")})
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Of its own files, which nobody reads, on a disk that is full.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    # It says with a traceback what we say in a line: that a trial's process has died.
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)


def _need(resources: ResourcesConfig) -> dict[str, float]:
    """What Tune reserves for a trial."""
    if resources.uses_train:
        # Its workers are reserved by Ray Train; Tune wants a resource all the same: a MiB of memory.
        return {"memory": 2**20}
    need: dict[str, float] = {"CPU": resources.cpus_per_worker}
    return need | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})


def _launcher(config: SweepConfig, state: SweepState, store: dict[str, Any] | None) -> Launch:
    """What a trial's process is told."""

    def launch(record: TrialRecord) -> dict[str, Any]:
        trial = config.trial_config(record.params)
        return {
            "trial_id": record.trial_id,
            "trial": trial.to_dict(),
            "weights": settled(trial),
            "resources": config.resources.to_dict(),
            "sweep_folder": str(state.folder.resolve()),
            "store": store,
            "working_folder": str(Path.cwd()),
            "log_format": log_lines.chosen(None),
            # One figure of an untrained model is enough: at step 0 all trials give pure noise.
            "evaluate_untrained": record.number == 0,
        }

    return launch


class _Unsaved:
    """Leaves nothing in Tune's own files: they are never read, and the sweep's state is on disk already."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SweepSearcher(_Unsaved, Searcher):
    """Hands the sweep's trials to Tune, no more at once than fit the cluster."""

    def __init__(self, state: SweepState, max_concurrent: int, launch: Launch, deaths: Deaths) -> None:
        super().__init__(metric=None, mode=None)
        self._state = state
        self.deaths = deaths
        self._max_concurrent = max_concurrent
        self._launch = launch
        self.sharing: Sharing | None = None
        """Its place among the sweeps of the cluster, where there may be others."""
        self.controller: Any = None
        """Tune's, as soon as it is known."""
        self.ids: dict[str, str] = {}
        """The sweep's trial ids by Tune's, of trials that Tune is running."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The config of the next trial; None while the cluster is full; FINISHED when no trial is left."""
        if len(self.ids) >= self._max_concurrent:
            return None
        left = self._left
        if self.sharing is not None and left > 0 and not self.sharing.may_start(len(self.ids), left):
            self._wait_for_others()
            return None if self._state.ending is None else Searcher.FINISHED
        record = self._state.next_trial()
        if not isinstance(record, TrialRecord):
            self._tell_others()
            return Searcher.FINISHED if record == "finished" else None
        self.ids[trial_id] = record.trial_id
        return self._launch(record)

    @property
    def _left(self) -> int:
        """Trials that Tune is still to run."""
        state = self._state
        if state.ending is not None:
            return 0
        new = max(0, state.config.search.num_trials - len(state.trials))
        return len(state.running) - len(self.ids) + new

    def _tell_others(self) -> None:
        if self.sharing is not None:
            self.sharing.tell(len(self.ids), self._left)

    def _wait_for_others(self) -> None:
        """Gives back what Tune keeps ready for a next trial that does not come now."""
        self._state.check_budget()
        if self.controller is None:
            return
        self.controller._cleanup_cached_actors(force_all=True)
        if not self.ids:
            # With no trial to run Tune asks for one in a loop, and looks after nothing else.
            self.controller._actor_manager.next(timeout=0.1)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Writes down how the trial ended, if the journal does not say so yet."""
        own_id = self.ids.pop(trial_id, None)
        if own_id is None:
            return
        if error:
            retries = self._state.config.failures.retries
            reason = f"its process died {retries + 1} times (failures.retries): "
            self._state.finish(own_id, "failed", reason + self.deaths.last.get(own_id, "unknown"))
        elif result is not None and result.get("done") and "failed" in result:
            status: Status = "failed" if result["failed"] else "completed"
            if "traceback" in result:
                file = self._state.trial_folder(own_id) / "error.txt"
                make_folder_durably(file.parent)
                write_durably(file, result["traceback"])
            self._state.finish(own_id, status, result["failed"], result["seconds"])
        elif result is not None and "disk_full" in result:
            self._state.end(f"{result['disk_full']}; everything is kept: go on with --resume")
        self.deaths.forget(own_id)
        self._tell_others()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is saved at every event."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class SweepScheduler(_Unsaved, FIFOScheduler):
    """Stops a trial when the sweep's early stopping says so."""

    def __init__(self, state: SweepState, searcher: SweepSearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state
        self._searcher = searcher

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first in line, as ever; the searcher gets to know Tune's controller."""
        self._searcher.controller = tune_controller._tune_controller
        chosen: Trial | None = super().choose_trial_to_run(tune_controller)
        return chosen

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Takes the report, and decides."""
        own_id = self._searcher.ids[trial.trial_id]
        report = Report(**json.loads(result["report"]))
        stop = self._state.report(own_id, report, result["seconds"])
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Finds out how a trial's process has died, whether it is started again or not."""
        self._searcher.deaths.note(self._searcher.ids[trial.trial_id], trial.pickled_error_file)


class _Retries(_Unsaved, tune.Callback):
    """Notes that a trial is started again."""

    def __init__(self, state: SweepState, searcher: SweepSearcher) -> None:
        self._state = state
        self._searcher = searcher

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Comes after the scheduler has heard that its process has died, where a retry is left."""
        own_id, deaths = self._searcher.ids[trial.trial_id], self._searcher.deaths
        self._state.retry(own_id, deaths.last[own_id], counted=own_id not in deaths.moved)


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
