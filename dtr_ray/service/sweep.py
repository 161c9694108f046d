"""Runs a sweep from its first trial to its last, or on from where it was killed."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dtr_ray.cache import cache_dir
from dtr_ray.config import SweepConfig
from dtr_ray.config.files import make_folder
from dtr_ray.data.identity import data_identity as identity_of
from dtr_ray.search.journal import read_events, replay
from dtr_ray.search.results import ResultFiles, write_best, write_trials
from dtr_ray.search.resuming import check_resumable, check_same_data
from dtr_ray.search.state import SweepState, is_complete, save_config
from dtr_ray.search.studies import check_study
from dtr_ray.service import cluster
from dtr_ray.service.display import Display
from dtr_ray.service.fetching import fetch_here, fetch_on_nodes, trial_weights
from dtr_ray.service.pictures import write_montage
from dtr_ray.service.run_log import RunLog
from dtr_ray.service.storing import SweepStorage
from dtr_ray.service.watchdog import watchdog

log = logging.getLogger(__name__)

# How long a sweep's end waits for an MLflow that takes records; one that takes none is given up sooner.
_TRACKING_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    state: SweepState
    best: dict[str, Any] | None
    montage: Path | None
    ending: str | None
    """Why it ended before all trials were done; None when they are."""
    records_waiting: int
    """MLflow records still on disk, to be sent by a resumed sweep."""
    tracking_uri: str
    fit_seconds: float
    """Wall seconds for which trials ran; 0 where all had ended before."""
    num_concurrent: int

    @property
    def error(self) -> str | None:
        """What went wrong; None, too, where the sweep has spent the budget that it was given."""
        return None if self.state.budget_spent else self.ending


def run_sweep(
    config: SweepConfig, folder: Path, *, resume: bool = False, storage: SweepStorage | None = None
) -> Outcome:
    """Runs a sweep in `folder`, and returns when its last trial has ended.

    Args:
        config: the sweep.
        folder: where it keeps everything; on a cluster a folder that all nodes share.
        resume: go on with the sweep that is there, if there is one. One that is complete is not run again:
            its results are written, and what MLflow lacks is sent, without Ray.
        storage: the store that holds the sweep, where it does; `folder` is then this machine's own, with what
            `storage.open` has brought.

    Raises:
        ValueError: the folder holds a sweep already, or another search, or one of other images; or is in use;
            pretrained weights cannot be had; the study's database does not answer.
        TooSmallError: one trial needs more than the cluster has.
        KeyboardInterrupt: interrupted; everything needed to resume is on disk.
    """
    check_folder(config, folder, resume=resume)
    if config.storage.study is not None:
        check_study(config.storage.study)
    num_concurrent, data_identity = 0, None
    if not _is_complete(config, folder):
        data_identity = identity_of(config.trial.data, cache_dir())
        if holds_sweep(folder):
            check_same_data(folder, data_identity)
        weights = fetch_here(trial_weights(config.trial))
        cluster.connect(dashboard=config.resources.uses_train, needs=config.resources)
        num_concurrent = cluster.num_concurrent_trials(config.resources, cluster.nodes())
        fetch_on_nodes(weights)
    make_folder(folder)
    with _sole_driver(folder), nullcontext() if storage is None else storage.held():
        save_config(config, folder)
        state = SweepState(config, folder, data_identity)
        run_log = RunLog(config, folder, state)
        fit_seconds = 0.0
        state.listeners += [run_log, ResultFiles(state)]
        try:
            with nullcontext() if storage is None else storage.attached(state):
                if not state.complete:
                    fit_seconds = _fit(state, num_concurrent, run_log, storage)
            best, montage = _finish(state, run_log)
        except BaseException as error:
            run_log.interrupted(error)
            run_log.close(3.0)
            raise
        finally:
            state.close()
        waiting = run_log.close(_TRACKING_TIMEOUT_S)
        if best is not None:
            best = write_best(state, run_log.run_id(best["trial_id"]))
    uri = run_log.tracking_uri
    return Outcome(state, best, montage, state.ending, waiting, uri, fit_seconds, num_concurrent)


def check_folder(config: SweepConfig, folder: Path, *, resume: bool) -> None:
    """Refuses to mix two sweeps in one folder; raises ValueError with what to do instead."""
    if not holds_sweep(folder):
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a sweep already: --resume goes on with it, --output DIR starts another elsewhere"
        )
    check_resumable(config, folder)


def holds_sweep(folder: Path) -> bool:
    """Whether a sweep has been started in the folder."""
    return (folder / "journal.jsonl").exists() and (folder / "sweep.json").exists()


def _is_complete(config: SweepConfig, folder: Path) -> bool:
    return holds_sweep(folder) and is_complete(config, replay(read_events(folder / "journal.jsonl")))


def _fit(state: SweepState, num_concurrent: int, run_log: RunLog, storage: SweepStorage | None) -> float:
    """Runs the trials; returns the wall seconds that took."""
    from dtr_ray.service.metrics import exported
    from dtr_ray.service.tuning import run_trials

    started, hung = time.monotonic(), dict[str, str]()
    with Display(state) as display, watchdog(state, hung):
        state.listeners.append(display)
        with exported(state, run_log.records_waiting):
            store = None if storage is None else storage.settings()
            run_trials(state.config, state, num_concurrent, hung, store)
    return time.monotonic() - started


def _finish(state: SweepState, run_log: RunLog) -> tuple[dict[str, Any] | None, Path | None]:
    """Writes the results; trials that a spent budget cut off count as stopped early."""
    if state.budget_spent:
        for trial in state.running:
            state.finish(trial.trial_id, "pruned", state.ending or "")
    write_trials(state)
    best = state.best()
    content = write_best(state, None if best is None else run_log.run_id(best[0].trial_id))
    montage = write_montage(state)
    if not state.done_before:
        run_log.end_sweep(content, montage, state.ending, is_error=not state.budget_spent)
    if state.complete:
        state.mark_done()
    return content, montage


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
