"""register_model: an exported model becomes a version in MLflow's registry, with its descent."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dtr_ray.service.mlflow_client import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST = "dtr_ray.digest"


def register_model(
    tracking_uri: str,
    name: str,
    folder: Path,
    *,
    sweep_run_id: str,
    trial_run_id: str,
    trial_id: str,
    metric: str,
    value: float,
    run_id: str | None = None,
) -> tuple[str, str]:
    """Uploads an exported folder to the run that made it and registers it as a new version.

    The version's `run_id` is that run, whose parent is the sweep's run; its tags name the sweep's run and
    the trial's, the trial, the metric and its value. The same folder from the same run is registered once:
    asked for again, its version is returned.

    Args:
        tracking_uri: MLflow's.
        name: of the registered model, made if absent.
        folder: what to register; it is copied to the run's artifacts, as `model-<digest>`.
        sweep_run_id: MLflow run of the sweep.
        trial_run_id: MLflow run of the trial whose configuration the model has.
        trial_id: the trial's.
        metric: what the model was judged by.
        value: the metric's value for this model.
        run_id: MLflow run that made the model; default: the trial's own.

    Returns:
        Name and version of the model.

    Raises:
        ValueError: `folder` is no folder, or holds no file.
        mlflow.exceptions.MlflowException: MLflow does not answer or refuses.
    """
    digest = _digest(Path(folder))
    run_id = run_id or trial_run_id
    client = connect(tracking_uri)
    _make_model(client, name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id and version.tags.get(_DIGEST) == digest:
            return name, str(version.version)
    artifact_path = f"model-{digest[:12]}"
    client.log_artifacts(run_id, str(folder), artifact_path)
    tags = {
        "dtr_ray.sweep_run_id": sweep_run_id,
        "dtr_ray.trial_run_id": trial_run_id,
        "dtr_ray.trial_id": trial_id,
        "dtr_ray.metric": metric,
        "dtr_ray.value": str(value),
        _DIGEST: digest,
    }
    description = f"{metric} {value:g}, from trial {trial_id}"
    source = f"{client.get_run(run_id).info.artifact_uri}/{artifact_path}"
    version = client.create_model_version(name, source, run_id, tags, description=description)
    return name, str(version.version)


def _make_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _digest(folder: Path) -> str:
    """Hash of a folder's files, names and contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"{folder} is not a folder with a model's files")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
