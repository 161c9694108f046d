"""From a finished sweep to a registered model: `train_best` as it is typed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from finished_sweep import BEST_METRIC, log_sweep, make_sweep

from dtr_ray import evaluate, train_best
from dtr_ray.service.best import best_in_folder
from dtr_ray.service.final_run import final_resources
from dtr_ray.service.mlflow_client import connect
from dtr_ray.service.worker import sole_owner
from dtr_ray.training import latest_checkpoint
from dtr_ray.training.reports import ReportFile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; its experiment is known to MLflow."""
    return make_sweep(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs(sweep: Path) -> tuple[str, str]:
    """MLflow's ids of the sweep's run and the trial's."""
    return log_sweep(sweep)


@pytest.fixture(scope="module")
def result(sweep: Path, runs: tuple[str, str], ray_cluster: str) -> dict[str, Any]:
    """What `train_best SWEEP_DIR` leaves behind, trained by two workers."""
    assert train_best.main([str(sweep), "--workers", "2"]) == 0
    content: dict[str, Any] = json.loads((sweep / "best" / "result.json").read_text(encoding="utf-8"))
    return content


def test_the_full_schedule_is_trained_afresh_by_ray_train(sweep: Path, result: dict[str, Any]):
    assert (result["metric"], result["step"], result["num_samples"]) == (BEST_METRIC, 12, 24)
    (report,) = ReportFile(sweep / "best" / "trials" / "best" / "reports.jsonl").read()
    assert report.metrics[BEST_METRIC] == result["value"]
    assert result["config"]["routing"] == {"name": "dtr", "alpha": 2.0, "beta": 0.8, "rule": "pseudo_code"}
    assert result["lineage"]["trial_id"] == "t0000"


def test_a_figure_of_another_protocol_is_told_and_not_compared_with_the_searchs(
    sweep: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert result["protocol"]["evaluation.num_samples"] == 24
    assert result["protocol"]["data.identity"].startswith("digits-8-")
    # The sweep of this test is as one from before protocols were kept.
    assert result["lineage"]["measured_otherwise"] == ["one of them is of an unknown protocol"]
    export = sweep / "best" / result["export"]
    figures = json.loads((export / "figures.json").read_text(encoding="utf-8"))
    assert figures["metrics"][BEST_METRIC] == result["value"]
    assert figures["protocol"] == result["protocol"]
    assert "of another protocol: the two do not compare" in (export / "README.md").read_text(encoding="utf-8")
    train_best._print(result, sweep / "best")
    text = capsys.readouterr().out
    assert f"{BEST_METRIC}: {result['value']:.6g} ± {result['standard_error']:.2g} after 12 steps" in text
    assert "of another protocol (one of them is of an unknown protocol): no comparison" in text
    otherwise = ["evaluation.num_samples is 24, not 16"]
    train_best._print({**result, "lineage": result["lineage"] | {"measured_otherwise": otherwise}}, sweep)
    assert "of another protocol (evaluation.num_samples is 24, not 16)" in capsys.readouterr().out


def test_the_exports_distance_is_the_one_reported(
    sweep: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(sweep / "best" / result["export"])]) == 0
    name, value = capsys.readouterr().out.split()[:2]
    assert name == BEST_METRIC
    assert float(value) == pytest.approx(result["value"], rel=1e-3)


def test_the_registered_model_leads_back_to_the_sweep(
    sweep: Path, runs: tuple[str, str], result: dict[str, Any], tmp_path: Path
):
    sweep_run_id, trial_run_id = runs
    client = connect(f"sqlite:///{sweep.parent / 'mlflow.db'}")
    registered = result["mlflow"]["registered"]
    version = client.get_model_version(registered["name"], registered["version"])
    assert registered["name"] == "tiny"
    assert version.tags["dtr_ray.sweep_run_id"] == sweep_run_id
    assert version.tags["dtr_ray.trial_run_id"] == trial_run_id
    assert float(version.tags["dtr_ray.value"]) == result["value"]
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["dtr_ray.kind"] == "best"
    assert run.data.tags["dtr_ray.status"] == "completed"
    assert run.data.tags["mlflow.parentRunId"] == sweep_run_id
    assert run.data.params["training.num_steps"] == "12"
    history = client.get_metric_history(version.run_id, BEST_METRIC)
    assert [(m.step, m.value) for m in history] == [(12, result["value"])]
    names = {artifact.path for artifact in client.list_artifacts(version.run_id)}
    assert {"samples", "trial.json"} <= names
    folder = next(name for name in names if name.startswith("model-"))
    client.download_artifacts(version.run_id, folder, str(tmp_path))
    assert (tmp_path / folder / "model_index.json").is_file()


def test_a_finished_run_is_left_alone(
    sweep: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    before = (sweep / "best" / "result.json").stat().st_mtime_ns
    assert train_best.main([str(sweep), "--resume"]) == 0
    assert "tiny, version 1" in capsys.readouterr().out
    assert (sweep / "best" / "result.json").stat().st_mtime_ns == before
    assert train_best.main([str(sweep)]) == 2
    assert "holds a run already: --resume goes on" in capsys.readouterr().err


def test_interrupted_it_prints_the_command_that_goes_on_from_its_checkpoint(
    sweep: Path, runs: tuple[str, str], ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "best"
    changes = [
        "training.num_steps=1000000",
        "evaluation.every_steps=1000000",
        "training.checkpoint_every_steps=20",
    ]
    words = [str(sweep), "--output", str(folder), "--from-checkpoint", "--workers", "1"]
    words += [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "dtr_ray.train_best", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(folder.glob("trials/best/checkpoints/*[2-9]?")):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "on 1 worker of 1 CPU" in output
    assert errors.strip().endswith("--resume")
    # Its workers end a moment after it.
    with sole_owner(folder / "trials" / "best"):
        checkpoint = latest_checkpoint(folder / "trials" / "best")
    assert checkpoint is not None
    done = int(checkpoint.name)
    assert done % 20 == 0

    changes = [f"training.num_steps={done + 10}", f"evaluation.every_steps={done + 10}"]
    words = [*words[:-6], *(word for change in changes for word in ("--set", change)), "--resume"]
    assert train_best.main(words) == 0
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["step"] == done + 10
    assert result["lineage"]["from_checkpoint"].endswith("trials/t0000/checkpoints/00000006")
    assert f"after {done + 10:,} steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "routing.alpah=3"], "did you mean routing.alpha?"),
        (["--set", "training.num_steps=0"], "must be above 0, got 0"),
        (["--resume"], "no run to resume in"),
    ],
)
def test_wrong_input_exits_with_2_before_ray_starts(
    sweep: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train_best.main([str(sweep), "--output", str(tmp_path / "best"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "best").exists()


def test_workers_that_cannot_share_the_batch_are_refused(
    sweep: Path, ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(sweep), "--output", str(tmp_path / "best"), "--workers"]
    assert train_best.main([*words, "5"]) == 2
    assert "--workers is 5: it must divide training.batch_size 12" in capsys.readouterr().err
    assert train_best.main([*words, "4"]) == 2
    assert "needs 4 workers of 1 CPU, but the cluster has room for 2" in capsys.readouterr().err
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(("batch_size", "expected"), [(12, 1), (32, 2), (33, 1), (64, 2)])
def test_every_cpu_gets_a_worker_where_the_batch_is_large_enough(
    sweep: Path, ray_cluster: str, batch_size: int, expected: int
):
    resources = final_resources(best_in_folder(sweep), batch_size, None)
    assert (resources.workers_per_trial, resources.uses_train) == (expected, True)


def test_without_a_sweep_the_newest_one_is_taken_or_missed(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert train_best.main([]) == 2
    assert "no finished sweep in runs" in capsys.readouterr().err
    shutil.copytree(sweep, tmp_path / "runs" / "mine")
    assert train_best.main(["--set", "routing.beta=2"]) == 2
    assert "routing.beta" in capsys.readouterr().err
    assert train_best.main(["--experiment", "tiny"]) == 2
    assert "there is no MLflow store" in capsys.readouterr().err
