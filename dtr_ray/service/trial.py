"""A trial under Ray Tune: one Trainable for both placements, in its own process or over Ray Train workers.

`step()` trains up to the next evaluation and hands its report to Tune, which decides before any further
step is taken. A trial's own errors are answers, not crashes: they are returned and never retried.
"""

import json
import time
import traceback
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune

from dtr_ray.config import TrialConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service.distributed_trial import run_on_train
from dtr_ray.service.worker import run_worker
from dtr_ray.training import Report


class SweepTrial(tune.Trainable):
    """Runs the trial that its config describes: `trial_id`, `trial`, `resources`, `sweep_folder`, `evaluate_untrained`."""

    _run: Generator[Report]

    def setup(self, config: dict[str, Any]) -> None:
        """Starts a trial in a fresh process; it goes on from its newest checkpoint if it has one."""
        self._started = time.monotonic()
        self._folder = Path(config["sweep_folder"]) / "trials" / config["trial_id"]
        self._run = reports_of(config)

    def step(self) -> dict[str, Any]:
        """Trains to the next report. The last answer of a trial has `done`, and `failed` with a reason if it failed."""
        try:
            report = next(self._run)
        except StopIteration:
            return {"done": True, "failed": ""}
        except Exception as error:  # every error of a trial is recorded with its reason, none ends the sweep
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            return {"done": True, "failed": reason_of(error)}
        return {"done": False, "report": json.dumps(asdict(report)), "wall_s": time.monotonic() - self._started}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Gives back what the former trial held, and starts the next one in the same process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Stops the trial where it is and gives everything back; Ray Train workers end in good order."""
        self._run.close()
        release_memory()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: trials keep their own checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: a trial finds its own newest checkpoint when it is set up."""


def reports_of(config: dict[str, Any]) -> Generator[Report]:
    """The reports of a trial, run where its resources say."""
    trial = TrialConfig.from_dict(config["trial"])
    resources = ResourcesConfig.from_dict(config["resources"])
    folder, untrained = Path(config["sweep_folder"]), config["evaluate_untrained"]
    if resources.uses_train:
        yield from run_on_train(trial, folder, config["trial_id"], resources, evaluate_untrained=untrained)
    else:
        yield from run_worker(trial, folder, config["trial_id"], evaluate_untrained=untrained)


def release_memory() -> None:
    """Gives GPU memory that PyTorch caches back to the device, for whoever comes next."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason_of(error: BaseException) -> str:
    """An error in one line: its innermost cause, with out-of-memory named as such."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    name = type(error).__name__
    if "OutOfMemory" in name or isinstance(error, MemoryError):
        name = "out of memory"
    return f"{name}: {text[-1]}" if text else name
