"""A finished sweep of one tiny trial, as a real one leaves it: folder and MLflow runs."""

import json
from pathlib import Path
from typing import Any

from tiny_trials import METRIC, TINY, digits

from dtr_ray.config import SweepConfig, flatten
from dtr_ray.search.provenance import sweep_identity
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.tracking import Tracker
from dtr_ray.training import train

SWEEP: dict[str, Any] = {
    "name": "tiny",
    "trial": TINY,
    "space": {"routing.alpha": {"type": "uniform", "low": 1.0, "high": 8.0}},
    "best": {"training.num_steps": 12, "evaluation.every_steps": 12, "evaluation.num_samples": 24},
}
BEST_METRIC = "fd_efficientnet_lite0_24"
PARAMS = {"routing.alpha": 2.0}


def make_sweep(root: Path, **changes: Any) -> Path:
    """The folder of the sweep `tiny` in `root`; its trial t0000 is trained and evaluated."""
    sweep = SweepConfig.from_dict(SWEEP | changes)
    folder = root / sweep.name
    trial = folder / "trials" / "t0000"
    trial.mkdir(parents=True)
    config = sweep.trial_config(PARAMS)
    config.save(trial / "trial.json")
    (report,) = train(config, trial, digits(config))
    (folder / "sweep.json").write_text(json.dumps(sweep.to_dict()), encoding="utf-8")
    best = {
        "trial_id": "t0000",
        "metric": METRIC,
        "mode": "min",
        "value": report.metrics[METRIC],
        "step": report.step,
        "params": PARAMS,
        "config": config.to_dict(),
        "checkpoint": f"trials/t0000/{report.checkpoint}",
        "mlflow_run_id": None,
    }
    (folder / "best.json").write_text(json.dumps(best), encoding="utf-8")
    return folder


def log_sweep(folder: Path) -> tuple[str, str]:
    """Puts the sweep into the MLflow store beside it; returns the ids of its run and of its trial's."""
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    tracker = Tracker(
        folder, f"sqlite:///{folder.parent.resolve() / 'mlflow.db'}", folder.name, sweep_identity(folder)
    )
    with RecordWriter(record_path(folder, "sweep", "driver")) as writer:
        writer.start(folder.name, {"dtr_ray.kind": "sweep", "dtr_ray.metric": best["metric"]}, {})
        writer.artifact("sweep.json")
        writer.end("FINISHED")
    with RecordWriter(record_path(folder, "t0000", "driver")) as writer:
        tags = {"dtr_ray.kind": "trial", "dtr_ray.trial_id": "t0000"}
        writer.start("t0000", tags, flatten(best["config"]), "sweep")
        writer.metrics(best["step"], {best["metric"]: best["value"]})
        writer.artifact("trials/t0000/trial.json")
        checkpoint = str((folder / best["checkpoint"]).resolve())
        writer.tags({"dtr_ray.status": "completed", "dtr_ray.checkpoint": checkpoint})
        writer.end("FINISHED")
    tracker.start()
    assert tracker.close(60.0) == 0
    sweep_run, trial_run = tracker.run_id("sweep"), tracker.run_id("t0000")
    assert sweep_run is not None
    assert trial_run is not None
    return sweep_run, trial_run
