"""Runs a sweep from its first trial to its last, or on from where it was killed."""

import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dtr_ray.config import SweepConfig
from dtr_ray.service import cluster
from dtr_ray.service.display import Display, read_heartbeat
from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.results import write_best, write_montage, write_trials
from dtr_ray.service.run_log import RunLog
from dtr_ray.service.state import SweepState, check_resumable, save_config

log = logging.getLogger(__name__)

# How long a sweep's end waits for records that MLflow has not taken yet.
_TRACKING_TIMEOUT_S = 60.0
# After the stall time-out Tune has this long to end by itself.
_STALL_GRACE_S = 90.0


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    state: SweepState
    best: dict[str, Any] | None
    montage: Path | None
    error: str | None
    """Why it ended before all trials were done; None when they are."""
    records_waiting: int
    """MLflow records still on disk, to be sent by a resumed sweep."""
    tracking_uri: str
    fit_seconds: float
    num_concurrent: int


def run_sweep(config: SweepConfig, folder: Path, *, resume: bool = False) -> Outcome:
    """Runs a sweep in `folder`, and returns when its last trial has ended.

    Args:
        config: the sweep.
        folder: where it keeps everything; on a cluster a folder that all nodes share.
        resume: go on with the sweep that is there.

    Raises:
        ValueError: the folder holds a sweep already (or none, with `resume`), or another search.
        TooSmallError: one trial needs more than the cluster has.
        KeyboardInterrupt: interrupted; everything needed to resume is on disk.
    """
    check_folder(config, folder, resume=resume)
    cluster.connect(dashboard=config.resources.uses_train)
    num_concurrent = cluster.num_concurrent_trials(config.resources, cluster.nodes())
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_driver(folder):
        save_config(config, folder)
        state = SweepState(config, folder)
        run_log = RunLog(config, folder, resumed=resume)
        state.listeners.append(run_log)
        try:
            with Display(state) as display, _watchdog(state, config.failures.stall_timeout_s):
                state.listeners.append(display)
                started = time.monotonic()
                _fit(config, state, num_concurrent)
                fit_seconds = time.monotonic() - started
            best = _finish(state, run_log)
            montage = write_montage(state)
            run_log.end_sweep(best, montage, state.ending)
        finally:
            state.close()
            waiting = run_log.close(_TRACKING_TIMEOUT_S if sys.exc_info()[0] is None else 5.0)
        if best is not None and best["mlflow_run_id"] is None:
            best = write_best(state, run_log.run_id(best["trial_id"]))
    return Outcome(state, best, montage, state.ending, waiting, run_log.tracking_uri, fit_seconds, num_concurrent)


def check_folder(config: SweepConfig, folder: Path, *, resume: bool) -> None:
    """Refuses to mix two sweeps in one folder; raises ValueError with what to do instead."""
    exists = (folder / "journal.jsonl").exists()
    if exists and not resume:
        raise ValueError(
            f"{folder} holds a sweep already: --resume goes on with it, --output DIR starts another elsewhere"
        )
    if resume and not exists:
        raise ValueError(f"there is no sweep to resume in {folder}")
    if exists:
        check_resumable(config, folder)


def _fit(config: SweepConfig, state: SweepState, num_concurrent: int) -> None:
    """Lets Ray Tune run the trials."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Tune writes its own state every so often; the journal makes it superfluous.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(num_concurrent)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Ray Train asks its workers for news this often, and so takes this long to see that they are done.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    from ray import tune

    from dtr_ray.service.trial import SweepTrial
    from dtr_ray.service.tuning import SweepScheduler, SweepSearcher, SweepStopper

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    resources = config.resources
    # A trial over Ray Train takes its workers itself; Tune wants a resource all the same: a MiB of memory.
    need: dict[str, float] = {"memory": 2**20}
    if not resources.uses_train:
        need = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            need["GPU"] = resources.gpus_per_worker
    scratch = state.folder / ".ray"
    shutil.rmtree(scratch, ignore_errors=True)

    def launch(record: TrialRecord) -> dict[str, Any]:
        return {
            "trial_id": record.trial_id,
            "trial": config.trial_config(record.params).to_dict(),
            "resources": resources.to_dict(),
            "sweep_folder": str(state.folder.resolve()),
            # One figure of an untrained model is enough: at step 0 all trials give pure noise.
            "evaluate_untrained": record.number == 0,
        }

    searcher = SweepSearcher(state, num_concurrent, launch)
    tuner = tune.Tuner(
        tune.with_resources(SweepTrial, tune.PlacementGroupFactory([need])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=SweepScheduler(state, searcher),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch.resolve()),
            stop=SweepStopper(state),
            failure_config=tune.FailureConfig(max_failures=config.failures.retries),
            verbose=0,
        ),
    )
    tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)


def _finish(state: SweepState, run_log: RunLog) -> dict[str, Any] | None:
    """Writes the results; trials that a spent budget cut off count as stopped early."""
    if state.budget_spent:
        for trial in state.running:
            state.finish(trial.trial_id, "pruned", state.ending or "")
    write_trials(state)
    best = state.best()
    return write_best(state, None if best is None else run_log.run_id(best[0].trial_id))


@contextmanager
def _sole_driver(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process runs the sweep in {folder}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _watchdog(state: SweepState, stall_timeout_s: float) -> Iterator[None]:
    """Ends a sweep that makes no progress: in good order if Tune still can, else by ending the process."""
    done = threading.Event()

    def watch() -> None:
        last, since = _progress(state), time.monotonic()
        while not done.wait(min(5.0, stall_timeout_s / 4)):
            now = _progress(state)
            if now != last:
                last, since = now, time.monotonic()
            idle = time.monotonic() - since
            if idle > stall_timeout_s:
                state.end(f"no trial has made a step for {idle:.0f} s (failures.stall_timeout_s)")
            if idle > stall_timeout_s + _STALL_GRACE_S:
                faulthandler.dump_traceback(all_threads=True)
                print(f"error: the sweep hangs: {state.ending}; --resume goes on with it", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _progress(state: SweepState) -> tuple[Any, ...]:
    """Something that changes whenever any trial makes a step."""
    running = [t.trial_id for t in list(state.trials.values()) if t.status == "running"]
    beats = tuple(read_heartbeat(state.trial_folder(t)).get("time", 0.0) for t in running)
    return len(state.trials), tuple(running), beats
