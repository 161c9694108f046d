"""A trial under Ray Tune: one Trainable for both placements, in its own process or over Ray Train workers.

`step()` trains up to the next evaluation and hands its report to Tune, which decides before any further
step is taken. A trial's own errors are answers, not crashes: they are returned and never retried. A process
that dies, this one or a worker, is Tune's to start again.
"""

import json
import logging
import math
import time
import traceback
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune

from dtr_ray import log_lines
from dtr_ray.config import TrialConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.disk import DiskFullError, is_full, make_folder_durably, wait_hours, write_durably
from dtr_ray.service.distributed_trial import Workers
from dtr_ray.service.draining import MachineLeftError, draining
from dtr_ray.service.elastic import choose_workers
from dtr_ray.service.gate import WorkersLostError
from dtr_ray.service.processes import enlist, enlisted
from dtr_ray.service.worker import FolderInUseError, enter, folder_here, release_memory, run_worker
from dtr_ray.storage.trial_copy import SupersededError
from dtr_ray.training import Report
from dtr_ray.training.leaving import LeftError

log = logging.getLogger(__name__)

# PyTorch's allocator of the CPU, and cuBLAS.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

_RESTART_S = 20.0


class SweepTrial(tune.Trainable):
    """Runs the trial that its config describes, and in the same process the next ones of its slot.

    Keys: `trial_id`, `trial`, `weights` and `resources` (plain values), `sweep_folder`, `store`,
    `evaluate_untrained`, `log_format`, and `working_folder`, where the sweep was started.
    """

    _run: Generator[Report]
    _workers: Workers | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Starts a trial; it goes on from its newest checkpoint if it has one."""
        self._told = time.monotonic()
        enter(config["working_folder"])
        # As its driver knows it: a trial in a store has another on this machine.
        self._folder = Path(config["sweep_folder"]) / "trials" / config["trial_id"]
        log_lines.follow(config["log_format"], trial=config["trial_id"])
        self._config, self._restarts_until = config, math.inf
        self._run = self._reports(config)

    def step(self) -> dict[str, Any]:
        """Trains to the next report: its JSON, and the `seconds` since the last one.

        The last answer of a trial has `done`, and in `failed` the reason why it failed, or ""; or in
        `disk_full` why it can go on only when a resumed sweep finds room.
        """
        try:
            answer = self._answer()
        except DiskFullError as error:
            answer = {"done": True, "disk_full": str(error)}
        now = time.monotonic()
        answer["seconds"], self._told = now - self._told, now
        return answer

    def _answer(self) -> dict[str, Any]:
        while True:
            try:
                answer = {"done": False, "report": json.dumps(asdict(next(self._run)))}
                self._restarts_until = math.inf
                return answer
            except StopIteration:
                return {"done": True, "failed": ""}
            except LeftError as error:
                raise MachineLeftError(str(error)) from error
            except WorkersLostError as error:
                if draining(one.node for one in enlisted(self._folder)):
                    raise MachineLeftError("its machine was to go") from error
                raise
            except (FolderInUseError, SupersededError, DiskFullError):
                raise
            except Exception as error:  # every error is recorded with its reason, none ends the sweep
                if not is_full(error):
                    return {"done": True, "failed": reason_of(error), **self._traceback()}
                self._restart(error)

    def _traceback(self) -> dict[str, str]:
        """Keeps the error that is handled now; where the sweep is in a store, its driver does."""
        text = traceback.format_exc()
        if self._config["store"] is not None:
            return {"traceback": text}
        make_folder_durably(self._folder)
        write_durably(self._folder / "error.txt", text)
        return {}

    def _restart(self, error: Exception) -> None:
        """Goes on from the newest checkpoint after a while: some disk was full, maybe of temporary files."""
        now = time.monotonic()
        self._restarts_until = min(self._restarts_until, now + 3600 * wait_hours())
        if now > self._restarts_until:
            reason = f"a disk has been full for {wait_hours():g} hours: {reason_of(error)}"
            raise DiskFullError(reason) from error
        log.warning("%s: %s: it goes on from its checkpoint", self._folder.name, reason_of(error))
        time.sleep(_RESTART_S)
        self._run = self._reports(self._config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Gives back what the former trial held, and starts the next one in the same process."""
        self._run.close()
        release_memory()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Stops the trial where it is and gives everything back; Ray Train workers end in good order."""
        self._run.close()
        if self._workers is not None:
            self._workers.leave()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: trials keep their own checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: a trial finds its own newest checkpoint when it is set up."""

    def _reports(self, config: dict[str, Any]) -> Generator[Report]:
        """The reports of a trial, run where its resources say."""
        trial = TrialConfig.from_dict(config["trial"])
        resources = ResourcesConfig.from_dict(config["resources"])
        place = Path(config["sweep_folder"]), config["trial_id"]
        how = {name: config[name] for name in ("evaluate_untrained", "weights", "store")}
        if resources.uses_train:
            enlist(place[0] / "trials" / config["trial_id"], "trial")
            here = folder_here(place[0], config["store"])
            workers = self._usable_workers(trial, here, config["trial_id"], resources)
            yield from workers.train(trial, *place, **how)
        else:
            yield from run_worker(trial, *place, use_gpu=bool(resources.gpus_per_worker), **how)

    def _usable_workers(
        self, trial: TrialConfig, sweep_folder: Path, trial_id: str, resources: ResourcesConfig
    ) -> Workers:
        """Those of the trial before, unless its error has ended them, or there may be more of them now."""
        batch_size, before = trial.training.batch_size, self._workers
        if before is not None and before.usable:
            count = choose_workers(resources, batch_size, before.num_workers, wait_s=0.0)
            if count == before.num_workers:
                return before
        if before is not None:
            before.leave()
            self._workers = None
        count = choose_workers(resources, batch_size)
        if count < resources.workers_per_trial:
            log.warning("%s: %d workers of %d: there is room for no more", trial_id, count,
                        resources.workers_per_trial)  # fmt: skip
        self._workers = Workers(trial_id, sweep_folder / ".ray" / "train", resources, count)
        return self._workers


def reason_of(error: BaseException) -> str:
    """An error in one line, with out-of-memory named as such."""
    text = str(error).strip().splitlines()
    name = type(error).__name__
    refused = any(word in str(error) for word in _NO_MEMORY)
    if "OutOfMemory" in name or isinstance(error, MemoryError) or refused:
        name = "out of memory"
    return f"{name}: {text[0]}" if text else name
