"""Models by their MLflow reference: a trial's, a sweep's, a final training's, a registered one."""

import json
from pathlib import Path

import pytest
from finished_sweep import log_sweep, make_sweep

from dtr_ray import sample
from dtr_ray.cache import cache_dir
from dtr_ray.export.folder import export_model
from dtr_ray.export.trained import find_model
from dtr_ray.service.mlflow_client import connect
from dtr_ray.service.registry import register_model
from dtr_ray.service.runs import fetch_model


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def uri(sweep: Path) -> str:
    return f"sqlite:///{sweep.parent / 'mlflow.db'}"


@pytest.fixture(scope="module")
def runs(sweep: Path) -> tuple[str, str]:
    """MLflow's ids of the sweep's run and the trial's."""
    return log_sweep(sweep)


@pytest.fixture(scope="module")
def registered(sweep: Path, uri: str, runs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a final training whose export is version 1 of the model `tiny`."""
    export = tmp_path_factory.mktemp("export") / "model"
    export_model(find_model(sweep), export)
    client, (sweep_run, trial_run) = connect(uri), runs
    experiment = client.get_run(trial_run).info.experiment_id
    tags = {"dtr_ray.kind": "best", "dtr_ray.trial_id": "t0000", "mlflow.parentRunId": sweep_run}
    run_id: str = client.create_run(experiment, tags=tags).info.run_id
    facts = {"trial_id": "t0000", "metric": "fd", "value": 1.0, "run_id": run_id}
    register_model(uri, "tiny", export, sweep_run_id=sweep_run, trial_run_id=trial_run, **facts)
    return run_id


def test_a_trials_run_leads_to_its_checkpoint_and_a_sweeps_to_its_best_trials(
    sweep: Path, uri: str, runs: tuple[str, str], registered: str
):
    sweep_run, trial_run = runs
    best = json.loads((sweep / "best.json").read_text(encoding="utf-8"))
    expected = (sweep / best["checkpoint"]).resolve()
    assert fetch_model(f"runs:/{trial_run}", uri) == expected
    with pytest.raises(ValueError, match="a sweep without a best trial yet"):
        fetch_model(f"runs:/{sweep_run}", uri)
    connect(uri).set_tag(sweep_run, "dtr_ray.best_trial", "t0000")
    assert fetch_model(f"runs:/{sweep_run}", uri) == expected


def test_a_final_trainings_model_is_downloaded_once(uri: str, registered: str):
    folder = fetch_model(f"runs:/{registered}", uri)
    assert folder.parent == cache_dir()
    assert find_model(folder) == folder
    written = (folder / "model_index.json").stat().st_mtime_ns
    for reference in ("models:/tiny/1", "models:/tiny", "models:/tiny/latest"):
        assert fetch_model(reference, uri) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == written


def test_sample_takes_a_reference(
    uri: str, registered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "grid.png"
    assert sample.main(["models:/tiny/1", "--tracking-uri", uri, "--num", "2", "--output", str(output)]) == 0
    assert output.is_file()
    assert sample.main(["models:/other/1", "--tracking-uri", uri, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: models:/other/1: MLflow at sqlite")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({}, "is none of a sweep: its tag dtr_ray.kind is None"),
        ({"dtr_ray.kind": "trial", "dtr_ray.status": "running"}, "has no checkpoint: its trial is running"),
        ({"dtr_ray.kind": "trial", "dtr_ray.checkpoint": "/gone"}, "at /gone, which is not on this machine"),
        ({"dtr_ray.kind": "best", "dtr_ray.status": "failed"}, "no model yet: its training is failed"),
    ],
)
def test_a_run_without_a_model_is_refused(
    uri: str, runs: tuple[str, str], tags: dict[str, str], message: str
):
    client = connect(uri)
    run = client.create_run(client.get_run(runs[0]).info.experiment_id, tags=tags)
    with pytest.raises(ValueError, match=message):
        fetch_model(f"runs:/{run.info.run_id}", uri)


def test_what_mlflow_does_not_know_is_refused(uri: str, runs: tuple[str, str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"runs:/nowhere: MLflow at sqlite.* says: .*nowhere"):
        fetch_model("runs:/nowhere", uri)
    with pytest.raises(ValueError, match="no model of that name is registered"):
        fetch_model("models:/nothing", uri)
    with pytest.raises(ValueError, match="there is no MLflow store"):
        fetch_model("runs:/nowhere", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
