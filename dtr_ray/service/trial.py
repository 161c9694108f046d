"""A trial under Ray Tune: one Trainable for both placements, in its own process or over Ray Train workers.

`step()` trains up to the next evaluation and hands its report to Tune, which decides before any further
step is taken. A trial's own errors are answers, not crashes: they are returned and never retried. A process
that dies, this one or a worker, is Tune's to start again.
"""

import json
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
from dtr_ray.service.distributed_trial import Workers, WorkersLostError
from dtr_ray.service.worker import FolderInUseError, enter, release_memory, run_worker
from dtr_ray.training import Report


class SweepTrial(tune.Trainable):
    """Runs the trial that its config describes, and in the same process the next ones of its slot.

    Keys: `trial_id`, `trial`, `weights` and `resources` (plain values), `sweep_folder`,
    `evaluate_untrained`, `log_format`, and `working_folder`, where the sweep was started.
    """

    _run: Generator[Report]
    _workers: Workers | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Starts a trial; it goes on from its newest checkpoint if it has one."""
        self._told = time.monotonic()
        enter(config["working_folder"])
        self._folder = Path(config["sweep_folder"]) / "trials" / config["trial_id"]
        log_lines.follow(config["log_format"], trial=config["trial_id"])
        self._run = self._reports(config)

    def step(self) -> dict[str, Any]:
        """Trains to the next report: its JSON, and the `seconds` since the last one.

        The last answer of a trial has `done`, and in `failed` the reason why it failed, or "".
        """
        try:
            answer = {"done": False, "report": json.dumps(asdict(next(self._run)))}
        except StopIteration:
            answer = {"done": True, "failed": ""}
        except (WorkersLostError, FolderInUseError):
            raise
        except Exception as error:  # every error of a trial is recorded with its reason, none ends the sweep
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            answer = {"done": True, "failed": reason_of(error)}
        now = time.monotonic()
        answer["seconds"], self._told = now - self._told, now
        return answer

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
        untrained = config["evaluate_untrained"]
        if resources.uses_train:
            workers = self._usable_workers(place[0], config["trial_id"], resources)
            yield from workers.train(trial, *place, evaluate_untrained=untrained, weights=config["weights"])
        else:
            use_gpu = bool(resources.gpus_per_worker)
            yield from run_worker(
                trial, *place, use_gpu=use_gpu, evaluate_untrained=untrained, weights=config["weights"]
            )

    def _usable_workers(self, sweep_folder: Path, trial_id: str, resources: ResourcesConfig) -> Workers:
        """Those of the trial before, unless its error has ended them."""
        if self._workers is not None and not self._workers.usable:
            self._workers.leave()
            self._workers = None
        if self._workers is None:
            self._workers = Workers(trial_id, sweep_folder / ".ray" / "train", resources)
        return self._workers


def reason_of(error: BaseException) -> str:
    """An error in one line, with out-of-memory named as such."""
    text = str(error).strip().splitlines()
    name = type(error).__name__
    if "OutOfMemory" in name or isinstance(error, MemoryError):
        name = "out of memory"
    return f"{name}: {text[0]}" if text else name
