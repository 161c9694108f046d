"""Finding the best trial of a sweep: in the sweep's folder, or in MLflow."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.files import checked_config, inside, needed, read_config, read_json
from dtr_ray.config.protocol import protocol_of
from dtr_ray.search.database import without_password
from dtr_ray.service.mlflow_client import answering, connect, sqlite_path
from dtr_ray.service.tracking import default_tracking_uri
from dtr_ray.storage.address import is_url, results_root
from dtr_ray.storage.fetching import fetch_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PARENT = "mlflow.parentRunId"
_BEST_KEYS: dict[str, type | tuple[type, ...]] = {
    "trial_id": str,
    "config": dict,
    "metric": str,
    "value": (int, float),
    "step": int,
    "checkpoint": (str, type(None)),
    "mlflow_run_id": (str, type(None)),
}


@dataclass(frozen=True)
class BestTrial:
    """The best trial of a sweep, and where it comes from."""

    trial_id: str
    config: TrialConfig
    """As the sweep ran it."""
    metric: str
    value: float
    step: int
    """Training step of the value."""
    checkpoint: Path | None
    run_id: str | None
    """MLflow's id of the trial's run, where it is known."""
    sweep: SweepConfig
    tracking_uri: str
    folder: Path
    """The sweep's, or where its would be."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What the value measures; empty where the records are from before that was kept."""

    @property
    def experiment(self) -> str:
        """Name of the sweep's MLflow experiment."""
        return self.sweep.tracking.experiment or self.sweep.name


def newest_sweep(root: Path) -> Path:
    """The folder below `root` whose best trial was found last; raises ValueError where there is none."""
    found = sorted(root.glob("*/best.json"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if (path.parent / "sweep.json").exists()]
    if not found:
        raise ValueError(
            f"no finished sweep in {root}: name the folder of one, or run python -m dtr_ray.sweep"
        )
    return found[-1].parent


def best_in_folder(folder: Path) -> BestTrial:
    """The best trial of the sweep in `folder`; raises ValueError where no sweep has left one."""
    if not (folder / "best.json").is_file():
        if (folder / "journal.jsonl").exists():
            raise ValueError(f"{folder}: the sweep there has no best trial yet: let it end first (--resume)")
        raise ValueError(f"{folder} is not the folder of a sweep: it has no best.json")
    if not (folder / "sweep.json").is_file():
        raise ValueError(f"{folder} has no sweep.json, the resolved sweep")
    file = folder / "best.json"
    found = read_json(file)
    needed(found, _BEST_KEYS, str(file))
    sweep = read_config(folder / "sweep.json", SweepConfig)
    checkpoint = inside(folder, found["checkpoint"], file) if found["checkpoint"] else folder
    return BestTrial(
        trial_id=found["trial_id"],
        config=checked_config(found["config"], TrialConfig, str(file)),
        metric=found["metric"],
        value=found["value"],
        step=found["step"],
        checkpoint=checkpoint if found["checkpoint"] and checkpoint.is_dir() else None,
        run_id=found["mlflow_run_id"],
        sweep=sweep,
        tracking_uri=sweep.tracking.uri or default_tracking_uri(results_root(sweep.storage.output, folder)),
        folder=folder,
        protocol=found.get("protocol", {}),
    )


def best_in_experiment(name: str, root: Path) -> BestTrial:
    """The best trial among the MLflow runs of an experiment.

    Args:
        name: the experiment's.
        root: folder of sweeps: holds the SQLite file where no server is named, and gets the results.

    Raises:
        ValueError: there is no such experiment, or no trial with a value in it.
    """
    uri = default_tracking_uri(root)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise ValueError(f"there is no MLflow store at {uri}: set MLFLOW_TRACKING_URI to the right one")
    with answering(uri, f"experiment {name!r}"):
        return _best_of(name, root, uri)


def _best_of(name: str, root: Path, uri: str) -> BestTrial:
    client = connect(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(e.name for e in client.search_experiments() if e.name != "Default") or "none"
        raise ValueError(f"MLflow at {without_password(uri)} has no experiment {name!r}; there are: {known}")
    sweeps = {run.info.run_id: run for run in _runs(client, experiment.experiment_id, "sweep")}
    trials = _runs(client, experiment.experiment_id, "trial")
    alive = [run for run in trials if run.data.tags.get("dtr_ray.status") != "failed"]
    scored = [(*found, run) for run in alive if (found := _best_value(client, run, sweeps)) is not None]
    if not scored:
        raise ValueError(f"no trial of the experiment {name!r} has a value yet")
    value, step, run = min(scored, key=lambda row: (row[0], row[2].info.start_time))
    parent = sweeps[run.data.tags[_PARENT]]
    checkpoint = run.data.tags.get("dtr_ray.checkpoint")
    sweep = checked_config(_artifact(client, parent, "sweep.json"), SweepConfig, f"{name}'s sweep.json")
    config = checked_config(_artifact(client, run, "trial.json"), TrialConfig, f"{name}'s trial.json")
    return BestTrial(
        trial_id=run.data.tags["dtr_ray.trial_id"],
        config=config,
        metric=parent.data.tags["dtr_ray.metric"],
        value=value,
        step=step,
        checkpoint=_checkpoint_here(checkpoint),
        run_id=run.info.run_id,
        sweep=sweep,
        tracking_uri=uri,
        folder=root / sweep.name,
        protocol=protocol_of(config) if "dtr_ray.protocol" in run.data.tags else {},
    )


def _checkpoint_here(place: str | None) -> Path | None:
    """The checkpoint that a run tells, where it still is; one in a store is fetched."""
    if place is not None and is_url(place):
        return fetch_folder(place)
    return Path(place) if place and Path(place).is_dir() else None


def lineage(best: BestTrial) -> tuple[str, str] | None:
    """MLflow's ids of the sweep's run and of the trial's; None where MLflow has not heard of the trial.

    Raises what MLflow raises where it does not answer.
    """
    client = connect(best.tracking_uri)
    run_id = best.run_id or _find_trial(client, best)
    if run_id is None:
        return None
    parent = client.get_run(run_id).data.tags.get(_PARENT)
    return None if parent is None else (parent, run_id)


def _find_trial(client: "MlflowClient", best: BestTrial) -> str | None:
    """The trial's run by the sweep's identity: best.json was written before MLflow had taken it."""
    identity = best.folder / "identity"
    experiment = client.get_experiment_by_name(best.experiment)
    if experiment is None or not identity.exists():
        return None
    sweep_id = identity.read_text(encoding="utf-8").strip()
    query = f"tags.`dtr_ray.sweep_id` = '{sweep_id}' and tags.`dtr_ray.run_key` = '{best.trial_id}'"
    found = client.search_runs([experiment.experiment_id], query)
    return str(found[0].info.run_id) if found else None


def _runs(client: "MlflowClient", experiment_id: str, kind: str) -> "list[Run]":
    """All runs of a kind, page by page."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], f"tags.`dtr_ray.kind` = '{kind}'", page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def _best_value(client: "MlflowClient", run: "Run", sweeps: "dict[str, Run]") -> tuple[float, int] | None:
    """(value, step) of the smallest value of the sweep's metric that the trained model reached."""
    parent = sweeps.get(run.data.tags.get(_PARENT, ""))
    if parent is None:
        return None
    metric = parent.data.tags.get("dtr_ray.metric", "")
    if metric not in run.data.metrics:
        return None
    history = [(m.value, m.step) for m in client.get_metric_history(run.info.run_id, metric) if m.step]
    return min(history) if history else None


def _artifact(client: "MlflowClient", run: "Run", name: str) -> Any:
    """A JSON file kept with a run."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run.info.run_id, name, folder)
        except (OSError, MlflowException) as error:
            raise ValueError(f"the MLflow run {run.info.run_name} has no {name}: {error}") from error
        return read_json(Path(path))
