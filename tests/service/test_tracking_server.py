"""Eight trials log to an MLflow server with passwords, on PostgreSQL, while both are killed and started.

In two to seven minutes: pytest tests/service/test_tracking_server.py -m slow -n 0 -s
"""

import importlib.util
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from postgres import BINARIES, Postgres
from tracking_server import SECRETS, USER, USERS_PASSWORD, TrackingServer

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.service.records import read_lines, tracking_folder
from dtr_ray.service.run_log import RunLog
from dtr_ray.training.reports import Report

ROOT = Path(__file__).parents[2]
METRIC = "fd_efficientnet_lite0_1k"
NUM_STEPS, SECONDS = 400, 75.0
KEYS = ["sweep", *(f"t{n:04}" for n in range(8))]
WRONG = "pl4nted-s3cret-mistyped"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(BINARIES is None, reason="needs Debian's postgresql"),
    pytest.mark.skipif(
        importlib.util.find_spec("flask_wtf") is None, reason="needs Flask-WTF, for MLflow's passwords"
    ),
]


@pytest.fixture(scope="module")
def server(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"), postgres_server)
    server.start()
    try:
        server.wait()
        server.add_user()
        yield server
    finally:
        server.kill()


def sweep(uri: str, output: Path) -> SweepConfig:
    values: dict[str, Any] = {
        "name": "eight",
        "trial": {
            "data": {"name": "digits", "resolution": 8},
            "model": {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
            "training": {"num_steps": NUM_STEPS},
            "sampling": {"sampler": "ddim", "num_steps": 5},
            "evaluation": {
                "every_steps": NUM_STEPS // 2,
                "num_samples": 1000,
                "features": "efficientnet_lite0",
            },
        },
        "space": {"routing.alpha": {"type": "uniform", "low": 1, "high": 4}},
        "search": {"num_trials": 8, "num_startup_trials": 4, "seed": 3},
        "tracking": {"uri": uri},
        "storage": {"output": str(output)},
    }
    return SweepConfig.from_dict(values)


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start_writers(folder: Path, trials: list[str]) -> list[subprocess.Popen[bytes]]:
    script, environment = str(ROOT / "tests/record_writer.py"), {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [str(NUM_STEPS), str(SECONDS)]
    return [
        subprocess.Popen([sys.executable, script, str(folder), trial, *words], env=environment)
        for trial in trials
    ]


def on_disk(folder: Path, run_key: str) -> list[dict[str, Any]]:
    """All records of a run, in the order of their times."""
    found = []
    for path in sorted((tracking_folder(folder) / run_key).glob("*.jsonl")):
        for line in read_lines(path, 0):
            assert line.record is not None
            found.append(line.record)
    return sorted(found, key=lambda record: record["time_ms"])


def expected(records: list[dict[str, Any]], of: str) -> dict[str, str]:
    """Tags or parameters that the records add up to."""
    return {k: v for r in records for k, v in r.get(of, r["values"] if r["kind"] == of else {}).items()}


def check_run(client: MlflowClient, run: Run, folder: Path, run_key: str) -> int:
    """The server has what the disk says, each once; returns the number of metric values."""
    records = on_disk(folder, run_key)
    metrics: dict[str, list[tuple[int, int, float]]] = {}
    for record in (r for r in records if r["kind"] == "metrics"):
        for key, value in record["values"].items():
            metrics.setdefault(key, []).append((record["step"], record["time_ms"], value))
    assert set(run.data.metrics) == set(metrics)
    for key, values in metrics.items():
        found = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        assert sorted(found) == sorted(values), (run_key, key)
    assert run.data.params == expected(records, "params")
    assert expected(records, "tags").items() <= run.data.tags.items()
    for record in (r for r in records if r["kind"] == "artifact"):
        source = folder / record["path"]
        name = "/".join(filter(None, [record["artifact_path"], source.name]))
        assert Path(client.download_artifacts(run.info.run_id, name)).read_bytes() == source.read_bytes()
    assert run.info.status == [r["status"] for r in records if r["kind"] == "end"][-1]
    return sum(len(values) for values in metrics.values())


def test_every_record_arrives_once_though_the_server_and_its_database_are_killed(
    postgres: Postgres,
    server: TrackingServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", WRONG)
    config, folder = sweep(server.uri, tmp_path), tmp_path / "eight"
    folder.mkdir()
    save_config(config, folder)
    state = SweepState(config, folder)
    run_log = RunLog(config, folder, state)
    state.listeners.append(run_log)
    run_log._tracker._poll_s, run_log._tracker._max_backoff_s = 0.2, 1.0
    run_log._tracker.start()
    # A wrong password is told, and nothing is lost by it.
    wait_for(lambda: "takes no records now" in caplog.text)
    assert "401" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", USERS_PASSWORD)
    trials = [trial for _ in range(8) if isinstance(trial := state.next_trial(), TrialRecord)]
    writers = start_writers(folder, [t.trial_id for t in trials])
    try:
        in_server = "select count(*) from metrics"
        wait_for(lambda: int(postgres.query(in_server, "mlflow")[0]) > 1000)
        server.kill()
        at_kill, waiting = int(postgres.query(in_server, "mlflow")[0]), run_log.records_waiting()
        time.sleep(2)
        server.start()
        server.wait()
        wait_for(lambda: int(postgres.query(in_server, "mlflow")[0]) > at_kill + 300)
        still_writing = sum(writer.poll() is None for writer in writers)
        assert still_writing
        postgres.kill()
        time.sleep(3)
        postgres.start()
        assert [writer.wait(120) for writer in writers] == [0] * 8
    finally:
        for writer in writers:
            writer.kill()
    for number, trial in enumerate(trials):
        metrics = {METRIC: 5.0, "train_seconds": 1.0}
        state.report(trial.trial_id, Report(NUM_STEPS, metrics, "checkpoints/00000400", "g.png"))
        state.finish(trial.trial_id, *(("failed", "out of memory") if number == 7 else ("completed", "")))
    (folder / "trials.csv").write_text("id\n")
    run_log.end_sweep(None, None, None, is_error=False)
    assert run_log.close(120.0) == 0
    state.close()

    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("eight")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:/")
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)
    assert sorted(r.data.tags["dtr_ray.run_key"] for r in runs) == KEYS
    count = sum(check_run(client, run, folder, run.data.tags["dtr_ray.run_key"]) for run in runs)
    # Each step of the three metrics, two evaluations, of eight trials.
    assert count == 8 * (3 * NUM_STEPS + 2) == int(postgres.query(in_server, "mlflow")[0])
    seen = caplog.text + server.log.read_text() + (postgres.folder / "log").read_text()
    seen += "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    seen += "".join(str(run.to_dictionary()) for run in runs)
    assert not [s for s in (*SECRETS.values(), USERS_PASSWORD, WRONG) if s in seen]
    print(
        f"\nat the kill {at_kill} values in, {waiting} records waiting, {still_writing} of 8 still writing "
        f"when the database died; in the end {count} values in {len(runs)} runs, each once"
    )


def test_a_stranger_is_refused_by_the_server(server: TrackingServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=60)
