"""fetch_model: from a run or a registered model of MLflow to the folder with its weights."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dtr_ray.cache import cache_dir, locked
from dtr_ray.service.mlflow_client import answering, connect, sqlite_path
from dtr_ray.service.tracking import default_tracking_uri
from dtr_ray.storage.address import is_url
from dtr_ray.storage.fetching import fetch_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN, MODEL = "runs:/", "models:/"


def fetch_model(reference: str, tracking_uri: str | None = None, root: Path = Path("runs")) -> Path:
    """The folder with the weights that MLflow knows under a reference.

    A trial's run tells the place of its checkpoint, and a sweep's that of its best trial: their weights never
    went to MLflow. A final training's and a registered model is downloaded, once a machine, to the cache.

    Args:
        reference: `runs:/RUN_ID`, `models:/NAME/VERSION`, or `models:/NAME` for its newest version.
        tracking_uri: MLflow's; default: MLFLOW_TRACKING_URI, else the SQLite file in `root`.
        root: folder of sweeps.

    Raises:
        ValueError: MLflow does not answer or does not know it, it has no model, or one that is not here.
    """
    uri = tracking_uri or default_tracking_uri(root)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise ValueError(f"there is no MLflow store at {uri}: give --tracking-uri or MLFLOW_TRACKING_URI")
    with answering(uri, reference):
        client = connect(uri)
        if reference.startswith(RUN):
            return _of_run(client, client.get_run(reference.removeprefix(RUN)))
        return _registered(client, reference.removeprefix(MODEL))


def _of_run(client: "MlflowClient", run: "Run") -> Path:
    tags, run_id = run.data.tags, run.info.run_id
    kind = tags.get("dtr_ray.kind")
    if kind == "sweep":
        return _of_run(client, _best_trial(client, run))
    if kind == "best":
        exports = [file.path for file in client.list_artifacts(run_id) if file.path.startswith("model-")]
        if not exports:
            raise ValueError(f"run {run_id} has no model yet: its training is {tags.get('dtr_ray.status')}")
        return _download(client, run_id, exports[-1])
    if kind != "trial":
        raise ValueError(f"run {run_id} is none of a sweep: its tag dtr_ray.kind is {kind}")
    checkpoint = tags.get("dtr_ray.checkpoint")
    if checkpoint is None:
        raise ValueError(f"run {run_id} has no checkpoint: its trial is {tags.get('dtr_ray.status')}")
    if is_url(checkpoint):
        return fetch_folder(checkpoint)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"run {run_id} has its checkpoint at {checkpoint}, which is not on this machine")
    return Path(checkpoint)


def _best_trial(client: "MlflowClient", sweep: "Run") -> "Run":
    run_id, name = sweep.info.run_id, sweep.data.tags.get("dtr_ray.best_trial")
    if name is None:
        raise ValueError(f"run {run_id} is a sweep without a best trial yet: give a trial's run")
    query = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`dtr_ray.trial_id` = '{name}'"
    found = client.search_runs([sweep.info.experiment_id], query)
    # The final training bears its trial's number too.
    trials: list[Run] = [run for run in found if run.data.tags.get("dtr_ray.kind") == "trial"]
    if not trials:
        raise ValueError(f"run {run_id} is a sweep whose best trial {name} MLflow does not know")
    return trials[0]


def _registered(client: "MlflowClient", name_and_version: str) -> Path:
    name, _, version = name_and_version.partition("/")
    if not version or version == "latest":
        versions = [int(found.version) for found in client.search_model_versions(f"name = '{name}'")]
        if not versions:
            raise ValueError(f"{MODEL}{name_and_version}: no model of that name is registered")
        version = str(max(versions))
    found = client.get_model_version(name, version)
    if not found.run_id or not found.source:
        raise ValueError(f"{MODEL}{name}/{version} was not registered by train_best: it names no run")
    return _download(client, found.run_id, found.source.rstrip("/").rpartition("/")[2])


def _download(client: "MlflowClient", run_id: str, artifact: str) -> Path:
    """A folder of a run's artifacts, in the cache: its name tells its content, so it never changes."""
    folder = cache_dir() / f"mlflow-{run_id}-{artifact}"
    if folder.is_dir():
        return folder
    with locked(folder):
        if not folder.is_dir():
            partial = folder.with_name(f".partial-{folder.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            client.download_artifacts(run_id, artifact, str(partial))
            (partial / artifact).replace(folder)
            partial.rmdir()
    return folder
