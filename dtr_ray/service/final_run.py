"""The final training: the best trial's configuration for the full schedule, exported and registered."""

import json
import logging
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_ray.config import TrialConfig, override
from dtr_ray.config.protocol import describe, differences
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.disk import write_durably
from dtr_ray.export.folder import export_model
from dtr_ray.export.trained import EXPORT_FOLDER
from dtr_ray.search.names import with_error
from dtr_ray.service import cluster
from dtr_ray.service.best import BestTrial
from dtr_ray.service.distributed_trial import run_on_train
from dtr_ray.service.draining import draining, own_node
from dtr_ray.service.fetching import settled
from dtr_ray.service.final_log import RUN_KEY, FinalLog
from dtr_ray.service.progress import TrainingProgress
from dtr_ray.service.trial import reason_of
from dtr_ray.training import Report
from dtr_ray.training.folder import claim_folder
from dtr_ray.training.leaving import LeftError
from dtr_ray.training.state import checkpoint_folder

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"
# Of a batch, for a worker that nobody asked for: with fewer it mostly waits for the others.
_MIN_IMAGES = 16


@dataclass(frozen=True)
class FinalRun:
    """What is to be trained, from what, and where to."""

    best: BestTrial
    config: TrialConfig
    folder: Path
    """Gets the run (in the layout of a sweep of one trial), the export and `result.json`."""
    resources: ResourcesConfig
    start_from: Path | None = None
    """Checkpoint of the trial to go on from; None trains from the first step."""

    @property
    def trial_folder(self) -> Path:
        """Where the run keeps its checkpoints, grids and reports."""
        return self.folder / "trials" / RUN_KEY


def final_config(best: BestTrial) -> TrialConfig:
    """The best trial's configuration with the sweep's changes for the full schedule (`best:`)."""
    return TrialConfig.from_dict(override(best.config.to_dict(), best.sweep.best))


def check_workers(num_workers: int | None, batch_size: int) -> None:
    """Raises ValueError where the batch cannot be shared evenly by the workers asked for."""
    if num_workers is not None and (num_workers < 1 or batch_size % num_workers):
        raise ValueError(f"--workers is {num_workers}: it must divide training.batch_size {batch_size}")


def final_resources(best: BestTrial, batch_size: int, num_workers: int | None) -> ResourcesConfig:
    """Workers of the final run: `num_workers`, the trial's where it used GPUs, else one for every CPU.

    On CPUs workers go before threads. The quickstart's model on two cores: a training step takes 60 ms with
    one worker, 46 with two, 39 with one of two threads, but an evaluation 6 s with two workers, 13 with two
    threads.

    Raises TooSmallError where the cluster has not so much.
    """
    resources = best.sweep.resources
    count = num_workers or resources.workers_per_trial
    machines = cluster.nodes()
    if num_workers is None and not resources.gpus_per_worker and not resources.autoscaling:
        room = int(sum(machine.cpus // resources.cpus_per_worker for machine in machines))
        most = max(1, min(room, batch_size // _MIN_IMAGES))
        count = next(n for n in range(most, 0, -1) if batch_size % n == 0)
    changes: dict[str, Any] = {"workers_per_trial": count, "placement": "train"}
    changes["min_workers_per_trial"] = None
    if resources.gpus_per_worker:
        changes["gpus_per_worker"] = max(1.0, resources.gpus_per_worker)
    resources = ResourcesConfig.from_dict(resources.to_dict() | changes)
    cluster.num_concurrent_trials(resources, machines)
    return resources


def run_final(run: FinalRun, *, resume: bool) -> dict[str, Any]:
    """Trains, evaluates, exports and registers; returns what `result.json` holds.

    Raises:
        ValueError: the folder holds a run already (or none, with `resume`), or another one.
        KeyboardInterrupt: interrupted; everything needed to resume is on disk.
    """
    claim_folder(run.trial_folder, run.config, resume=resume)
    log = FinalLog(run.best, run.config, run.folder, run.trial_folder)
    try:
        report = _train(run)
        result = _result(run, report)
        folder = export_model(
            checkpoint_folder(run.trial_folder, report.step),
            run.folder / EXPORT_FOLDER,
            name=run.best.sweep.name,
            facts=_facts(result),
            grid=run.trial_folder / report.grid,
            figures={"step": report.step, "metrics": report.metrics, "protocol": report.protocol},
        )
        result["mlflow"] = log.finish(folder, result["metric"], result["value"], describe(report.protocol))
    except KeyboardInterrupt:
        log.stop("KILLED", "interrupted")
        raise
    except Exception as error:
        log.stop("FAILED", reason_of(error))
        raise
    shutil.rmtree(run.folder / ".ray", ignore_errors=True)
    write_durably(run.folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return result


def _train(run: FinalRun) -> Report:
    """Trains to the end, elsewhere where a worker's machine is to go; returns the last report."""
    while True:
        try:
            return _train_here(run)
        except LeftError as error:
            if draining([own_node()]):
                raise
            log.warning("%s: it goes on elsewhere", error)


def _train_here(run: FinalRun) -> Report:
    last: Report | None = None
    reports = run_on_train(
        run.config,
        run.folder.resolve(),
        RUN_KEY,
        run.resources,
        start_from=run.start_from,
        weights=settled(run.config),
    )
    shown = TrainingProgress(run.trial_folder, run.config.training.num_steps, run.config.evaluation)
    with shown as progress, closing(reports):
        for last in reports:
            progress.report(last)
    assert last is not None
    assert last.step == run.config.training.num_steps
    return last


def _result(run: FinalRun, report: Report) -> dict[str, Any]:
    metric, best = run.config.evaluation.metric, run.best
    return {
        "metric": metric,
        "value": report.metrics[metric],
        "standard_error": report.metrics.get(f"{metric}_stderr"),
        "protocol": report.protocol,
        "num_samples": run.config.evaluation.num_samples,
        "step": report.step,
        "train_seconds": report.metrics["train_seconds"],
        "config": run.config.to_dict(),
        "checkpoint": str(checkpoint_folder(run.trial_folder, report.step).relative_to(run.folder)),
        "export": EXPORT_FOLDER,
        "lineage": {
            "sweep": best.sweep.name,
            "sweep_folder": str(best.folder.resolve()),
            "trial_id": best.trial_id,
            "trial_metric": best.metric,
            "trial_value": best.value,
            "trial_step": best.step,
            "trial_protocol": best.protocol,
            # Why the two figures do not compare; empty where they do.
            "measured_otherwise": differences(report.protocol, best.protocol),
            "from_checkpoint": None if run.start_from is None else str(run.start_from),
        },
    }


def _facts(result: dict[str, Any]) -> dict[str, str | float]:
    """What the model card tells of the result."""
    lineage = result["lineage"]
    origin = f"trial {lineage['trial_id']} of the sweep {lineage['sweep']}"
    found = f"{lineage['trial_metric']} {lineage['trial_value']:.4g} at step {lineage['trial_step']:,}"
    found += ", of another protocol: the two do not compare" if lineage["measured_otherwise"] else ""
    return {
        "steps": f"{result['step']:,}",
        result["metric"]: with_error(result["value"], result["standard_error"]),
        "measured": describe(result["protocol"]),
        "configuration": f"{origin} ({found})",
    }
