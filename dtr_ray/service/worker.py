"""A worker: runs a trial's loop in this process, and tells the sweep of it through files.

The same code serves a trial in its own Tune process and every worker of a Ray Train trial.
"""

import functools
import gc
import io
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dtr_ray import disk, log_lines
from dtr_ray.cache import cache_dir
from dtr_ray.config import DataConfig, TrialConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.distributed import Group
from dtr_ray.models.router import Router
from dtr_ray.search.provenance import environment
from dtr_ray.service.attempts import AttemptLog
from dtr_ray.service.draining import leaves_with, own_node
from dtr_ray.service.metrics import TrialMetrics, sweep_of
from dtr_ray.service.pictures import draw_mask
from dtr_ray.service.processes import enlist
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.trial_storage import peer_copy, trial_copy
from dtr_ray.storage.address import scratch_folder
from dtr_ray.storage.trial_copy import TrialCopy
from dtr_ray.training import Observer, Report, train
from dtr_ray.training.leaving import LeftError, MustLeave
from dtr_ray.weights.finding import Weights, find, required_weights
from dtr_ray.weights.offline import offline

log = logging.getLogger(__name__)

MASK_FILE = "mask.png"
# After its sweep was killed a trial's former process dies in seconds; on another machine than the head, which
# it has lost, in a minute or two.
_LOCK_TIMEOUT_S = 180.0


class FolderInUseError(RuntimeError):
    """A former process of the trial is still there: nothing that the trial has done itself."""


class FileObserver(Observer):
    """Writes metrics to the trial's record file, and signs of life for the sweep's display and watchdog."""

    def __init__(
        self,
        config: TrialConfig,
        sweep_folder: Path,
        trial_id: str,
        trial_folder: Path,
        copy: TrialCopy | None = None,
    ) -> None:
        self._copy = copy
        if copy is not None:
            copy.alive = self.waits_for_store
        self._records = RecordWriter(record_path(sweep_folder, trial_id, "worker"))
        self._prefix = trial_folder.relative_to(sweep_folder).as_posix()
        self._attempt = AttemptLog(trial_folder)
        self._step = 0
        sweep, number = sweep_of(sweep_folder), self._attempt.number
        self._metric_at = config.evaluation.metric_at
        self._exported = TrialMetrics(sweep, trial_id, config.training.batch_size, number)
        log_lines.always(sweep=sweep, trial=trial_id, step=None)
        log.info("attempt %d begins", number)
        self._records.tags(environment() | {"dtr_ray.workers": str(Group.current().world_size)})
        if _write_mask(config, trial_folder / MASK_FILE):
            self._records.artifact(f"{self._prefix}/{MASK_FILE}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records a step's numbers."""
        self._records.metrics(step, values)

    def progress(self, step: int, phase: str) -> None:
        """Gives a sign of life."""
        if self._copy is not None:
            self._copy.check()
        self._step = step
        if phase == "training":
            self._attempt.made(step)
        else:
            self._attempt.tell(step, phase)
        self._exported.progress(step)
        log_lines.always(step=step)
        if phase == "checkpointing" and self._copy is not None:
            self._copy.before_checkpoint()

    def waits_for_disk(self) -> None:
        """Gives a sign of life while there is no room to write."""
        self._attempt.tell(self._step, disk.WAITING)

    def waits_for_store(self) -> None:
        """Gives a sign of life while a checkpoint is on its way."""
        self._attempt.tell(self._step, "checkpointing")

    def settle(self) -> None:
        """Has records and steps on the disk."""
        self._records.settle()
        self._attempt.sync()

    def after_checkpoint(self) -> None:
        """Has it brought to the store."""
        if self._copy is not None:
            self._copy.after_checkpoint()

    def goes_on(self, step: int) -> None:
        """The sweep has the report of this step, and lets the trial go on."""
        self._attempt.tell(step, "training")

    def evaluated(self, report: Report) -> None:
        """Records an evaluation's numbers and its sample grid."""
        self._records.metrics(report.step, report.metrics)
        self._records.artifact(f"{self._prefix}/{report.grid}", "samples")
        with log_lines.about(event="reported", step=report.step, **report.metrics):
            log.info("evaluated")
        metric = self._metric_at(report.step)
        self._exported.evaluated(metric, report.metrics[metric])

    def flush(self) -> None:
        """Waits until the store has all, where there is one."""
        if self._copy is not None:
            self._copy.flush()

    def close(self) -> None:
        """Closes the files."""
        self._records.close()
        self._attempt.close()
        self._exported.close()


@functools.lru_cache(maxsize=2)
def shared_images(config: DataConfig) -> ImageData:
    """The images, loaded once for all trials that follow one another in this process."""
    return load_images(config, cache_dir())


def enter(folder: str) -> None:
    """Goes to the folder in which the sweep was started, that relative paths of a configuration begin with.

    Ray Tune and Ray Train put their processes into folders of their own. A machine that does not have the
    folder leaves the process where it is: there, paths are to be absolute.
    """
    if Path(folder).is_dir():
        os.chdir(folder)


def device_of_worker(use_gpu: bool) -> torch.device:
    """The GPU that Ray has given this process, or the CPU; raises RuntimeError where PyTorch sees no GPU."""
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("resources.gpus_per_worker asks for a GPU, but PyTorch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Holds the trial's folder, so that a former process of the same trial cannot write beside this one."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout:
        raise FolderInUseError(f"another process still trains in {folder}") from None
    try:
        yield
    finally:
        lock.release()


def run_worker(
    config: TrialConfig,
    sweep_folder: Path,
    trial_id: str,
    *,
    use_gpu: bool = False,
    start_from: Path | None = None,
    evaluate_untrained: bool = False,
    weights: Sequence[Mapping[str, Any]] = (),
    depends_on: Sequence[str] = (),
    store: Mapping[str, Any] | None = None,
) -> Generator[Report]:
    """Trains one trial as this worker of its group, yielding its reports; downloads nothing meanwhile.

    `weights` are the pretrained ones that it needs, with their commits; default: as its configuration says.
    A machine that has joined later fetches them now. `depends_on`: Ray's ids of further machines that it
    cannot go on without. `store` tells `url` and `epoch` of the store that holds the sweep, where it does;
    `sweep_folder` is then replaced by a folder of this machine.

    Raises LeftError where its machine, or one of those, is to go; after a checkpoint, if it trains.
    """
    needed = [Weights(**one) for one in weights] or required_weights(config.data, config.evaluation)
    for one in needed:
        find(one)
    with offline(), leaves_with({own_node(), *depends_on}) as must_leave:
        if must_leave():
            raise LeftError("its machine is to go")
        yield from _run_offline(
            config,
            sweep_folder,
            trial_id,
            use_gpu=use_gpu,
            start_from=start_from,
            evaluate_untrained=evaluate_untrained,
            must_leave=must_leave,
            store=store,
        )


def folder_here(sweep_folder: str | Path, store: Mapping[str, Any] | None) -> Path:
    """The sweep's folder as this machine has it."""
    return Path(sweep_folder) if store is None else scratch_folder(store["url"], "worker")


def _run_offline(
    config: TrialConfig,
    sweep_folder: Path,
    trial_id: str,
    *,
    use_gpu: bool,
    start_from: Path | None,
    evaluate_untrained: bool,
    must_leave: MustLeave,
    store: Mapping[str, Any] | None,
) -> Generator[Report]:
    known, sweep_folder = sweep_folder / "trials" / trial_id, folder_here(sweep_folder, store)
    folder, group = sweep_folder / "trials" / trial_id, Group.current()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    run = functools.partial(
        _train,
        config,
        folder,
        group=group,
        device=device_of_worker(use_gpu),
        start_from=start_from,
        evaluate_untrained=evaluate_untrained,
        must_leave=must_leave,
    )
    if not group.is_main:
        enlist(known, f"worker{group.rank}")
        with nullcontext() if store is None else peer_copy(store, group, folder):
            yield from run()
        return
    disk.make_folder_durably(folder)
    with sole_owner(folder), trial_copy(store, group, sweep_folder, trial_id) as copy:
        enlist(known, "worker0")
        observer = FileObserver(config, sweep_folder, trial_id, folder, copy)
        try:
            with disk.tells(observer.waits_for_disk):
                yield from _told(run(observer=observer), observer)
        finally:
            observer.close()


def _told(reports: Generator[Report], observer: FileObserver) -> Generator[Report]:
    """The reports; tells when the trial waits for what the sweep says to one."""
    with closing(reports):
        for report in reports:
            observer.flush()
            observer.progress(report.step, "waiting")
            yield report
            observer.goes_on(report.step)


def _train(config: TrialConfig, folder: Path, **kwargs: Any) -> Generator[Report]:
    """`train` with the images, which may take a while to load."""
    yield from train(config, folder, shared_images(config.data), **kwargs)


def release_memory() -> None:
    """Gives GPU memory that PyTorch caches back to the device, for whoever comes next."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _write_mask(config: TrialConfig, path: Path) -> bool:
    """Draws the routing mask, once: the last block's after the last step; returns whether there is one."""
    if not path.exists():
        model, steps = config.resolved_model, config.training.num_steps
        router = Router(config.routing, config.diffusion.num_timesteps)
        mask = router.mask(model.value("hidden_size"), steps, model.value("depth"))
        if mask is None:
            return False
        mask = mask if mask.ndim == 2 else mask[-1]
        picture = io.BytesIO()
        draw_mask(mask.numpy()).save(picture, "PNG")
        disk.write_durably(path, picture.getvalue())
    return True
