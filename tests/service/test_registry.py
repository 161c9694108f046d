"""A registered model leads back to its trial, and from there to its sweep."""

from pathlib import Path

import pytest

from dtr_ray.service.mlflow_client import connect
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.registry import register_model
from dtr_ray.service.tracking import Tracker


@pytest.fixture
def sweep(tmp_path):
    """A sweep with one trial in MLflow: its URI and a tracker that knows the run ids."""
    folder, uri = tmp_path / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    for run_key, parent in (("sweep", None), ("t0003", "sweep")):
        with RecordWriter(record_path(folder, run_key, "driver")) as writer:
            writer.start(run_key, {}, {}, parent)
    tracker = Tracker(folder, uri, "digits", "id")
    tracker.start()
    assert tracker.close(60.0) == 0
    return uri, tracker


def register(sweep, folder):
    uri, tracker = sweep
    return register_model(
        uri,
        "digits",
        folder,
        sweep_run_id=tracker.run_id("sweep"),
        trial_run_id=tracker.run_id("t0003"),
        trial_id="t0003",
        metric="fid_10k",
        value=12.5,
    )


def test_versions_lead_to_their_trial_and_its_sweep(sweep, tmp_path):
    uri, _ = sweep
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "transformer" / "weights.safetensors").write_bytes(b"weights")
    assert register(sweep, export) == ("digits", "1")
    assert register(sweep, export) == ("digits", "1")
    (export / "transformer" / "weights.safetensors").write_bytes(b"better")
    assert register(sweep, export) == ("digits", "2")
    client = connect(uri)
    version = client.get_model_version("digits", "1")
    trial = client.get_run(version.run_id)
    assert trial.data.tags["dtr_ray.trial_id"] == "t0003"
    parent = client.get_run(trial.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["dtr_ray.kind"] == "sweep"
    assert version.tags["dtr_ray.sweep_run_id"] == parent.info.run_id
    assert (version.tags["dtr_ray.metric"], version.tags["dtr_ray.value"]) == ("fid_10k", "12.5")
    place = version.source.rsplit("/", 1)[1]
    (file,) = client.list_artifacts(version.run_id, f"{place}/transformer")
    assert Path(client.download_artifacts(version.run_id, file.path)).read_bytes() == b"weights"


def test_an_empty_folder_is_refused(sweep, tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match="export"):
        register(sweep, tmp_path / "export")
