"""A worker: runs a trial's loop in this process, and tells the sweep of it through files.

The same code serves a trial in its own Tune process and every worker of a Ray Train trial.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dtr_ray.config import DataConfig, TrialConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.data.cache import cache_dir
from dtr_ray.distributed import Group
from dtr_ray.service.records import RecordWriter
from dtr_ray.training import Observer, Report, train

# A trial's former process may need a moment to die after its sweep was killed.
_LOCK_TIMEOUT_S = 60.0
_PROGRESS_INTERVAL_S = 0.5


class FileObserver(Observer):
    """Writes metrics to the trial's record file, and a heartbeat for the sweep's display and watchdog."""

    def __init__(self, sweep_folder: Path, trial_id: str, trial_folder: Path) -> None:
        self._records = RecordWriter(sweep_folder / "tracking" / trial_id / "worker.jsonl")
        self._prefix = trial_folder.relative_to(sweep_folder).as_posix()
        self._progress = trial_folder / "progress.json"
        self._told = 0.0

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records a step's numbers."""
        self._records.metrics(step, values)

    def progress(self, step: int, phase: str) -> None:
        """Renews the heartbeat, at most twice a second."""
        now = time.monotonic()
        if now - self._told < _PROGRESS_INTERVAL_S:
            return
        self._told = now
        temporary = self._progress.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "phase": phase, "time": time.time()}), encoding="utf-8")
        temporary.replace(self._progress)

    def evaluated(self, report: Report) -> None:
        """Records an evaluation's numbers and its sample grid."""
        self._records.metrics(report.step, report.metrics)
        self._records.artifact(f"{self._prefix}/{report.grid}", "samples")

    def close(self) -> None:
        """Closes the record file."""
        self._records.close()


@functools.lru_cache(maxsize=2)
def shared_images(config: DataConfig) -> ImageData:
    """The images, loaded once for all trials that follow one another in this process."""
    return load_images(config, cache_dir())


def device_of_worker() -> torch.device:
    """The GPU that Ray has given this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Holds the trial's folder, so that a former process of the same trial cannot write beside this one."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout:
        raise RuntimeError(f"another process still trains in {folder}") from None
    try:
        yield
    finally:
        lock.release()


def run_worker(
    config: TrialConfig,
    sweep_folder: Path,
    trial_id: str,
    *,
    start_from: Path | None = None,
    evaluate_untrained: bool = False,
) -> Generator[Report]:
    """Trains one trial as this worker of its group, yielding its reports."""
    folder = sweep_folder / "trials" / trial_id
    group = Group.current()
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    data = shared_images(config.data)
    run = functools.partial(
        train,
        config,
        folder,
        data,
        group=group,
        device=device_of_worker(),
        start_from=start_from,
        evaluate_untrained=evaluate_untrained,
    )
    if not group.is_main:
        yield from run()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with sole_owner(folder):
        observer = FileObserver(sweep_folder, trial_id, folder)
        try:
            yield from run(observer=observer)
        finally:
            observer.close()


def environment() -> dict[str, str]:
    """What the run depends on besides its configuration: versions, host and device."""
    device = device_of_worker()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "env.python": platform.python_version(),
        "env.torch": torch.__version__,
        "env.host": platform.node(),
        "env.device": name,
    }
