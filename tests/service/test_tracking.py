"""Records reach MLflow in order and exactly once, whatever happens to the server or to the shipper."""

import json
import logging
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from service.mlflow_server import MlflowServer, free_port

from dtr_ray.service.mlflow_client import connect
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.tracking import (
    Tracker,
    default_artifact_location,
    default_tracking_uri,
    send_waiting,
    ui_command,
)

EXPERIMENT, SWEEP_ID = "digits", "sweep-1"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's tables, made once: that takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(tmp_path, empty_database):
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my sweep").mkdir()
    return tmp_path / "my sweep"


@pytest.fixture
def server(tmp_path, empty_database):
    shutil.copyfile(empty_database, tmp_path / "server.db")
    server = MlflowServer(tmp_path)
    yield server
    server.kill()


def writer(folder: Path, run_key: str, name: str = "worker") -> RecordWriter:
    return RecordWriter(record_path(folder, run_key, name))


def start_sweep(folder: Path, trials: int = 1) -> None:
    with writer(folder, "sweep", "driver") as sweep:
        sweep.start("digits", {"note": "a sweep"}, {"search.num_trials": trials}, None)
    for number in range(trials):
        with writer(folder, f"t{number:04}", "driver") as trial:
            trial.start(f"t{number:04}", {}, {"routing.alpha": number}, "sweep")


def write_steps(folder: Path, run_key: str, first: int, stop: int) -> None:
    with writer(folder, run_key) as worker:
        for step in range(first, stop):
            worker.metrics(step, {"loss": 1.0 / (step + 1), "lr": 0.1})


def ship(folder: Path, uri: str, timeout_s: float = 30.0) -> Tracker:
    tracker = Tracker(folder, uri, EXPERIMENT, SWEEP_ID, poll_s=0.05, max_backoff_s=1.0)
    tracker.start()
    assert tracker.close(timeout_s) == 0
    return tracker


def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def runs(uri: str) -> dict:
    """MLflow's runs by run key; there is never a second one."""
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    found = mlflow.search_runs([experiment.experiment_id], run_view_type=3)
    by_key = {run.data.tags["dtr_ray.run_key"]: run for run in found}
    assert len(by_key) == len(found)
    return by_key


def history(uri: str, run_id: str, key: str = "loss") -> list[int]:
    return [m.step for m in client(uri).get_metric_history(run_id, key)]


def check_idempotent(uri: str) -> None:
    mlflow = client(uri)
    run_id = mlflow.create_run(mlflow.create_experiment("twice")).info.run_id
    metrics = [Metric("loss", 0.1 * step, 1000 + step, step) for step in range(20)]
    mlflow.log_batch(run_id, metrics[:12], [Param("p", "1")])
    mlflow.log_batch(run_id, metrics, [Param("p", "1")])
    mlflow.log_batch(run_id, metrics[5:8])
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "loss")] == [
        (m.step, m.value) for m in metrics
    ]


def test_mlflow_holds_a_batch_sent_twice_once(uri):
    check_idempotent(uri)


def test_a_sweeps_runs_are_linked_tagged_and_ended(folder, uri):
    start_sweep(folder, trials=3)
    write_steps(folder, "t0000", 0, 5)
    for number, status in enumerate(("FINISHED", "KILLED", "FAILED")):
        with writer(folder, f"t{number:04}", "driver") as trial:
            trial.end(status)
    with writer(folder, "sweep", "driver") as sweep:
        sweep.tags({"dtr_ray.status": "ended: out of time"})
        sweep.end("KILLED")
    tracker = ship(folder, uri)
    found = runs(uri)
    parent = found["sweep"].info.run_id
    assert found["sweep"].data.tags["dtr_ray.kind"] == "sweep"
    assert found["sweep"].data.tags["dtr_ray.status"] == "ended: out of time"
    assert found["sweep"].data.params == {"search.num_trials": "3"}
    for number, (ended, status) in enumerate(
        (("FINISHED", "completed"), ("KILLED", "pruned"), ("FAILED", "failed"))
    ):
        run = found[f"t{number:04}"]
        assert run.info.status == ended
        assert run.info.run_name == f"t{number:04}"
        assert run.info.end_time is not None
        expected = {
            "mlflow.parentRunId": parent,
            "dtr_ray.kind": "trial",
            "dtr_ray.trial_id": f"t{number:04}",
            "dtr_ray.status": status,
        }
        assert expected.items() <= run.data.tags.items()
    assert tracker.run_id("t0002") == found["t0002"].info.run_id
    assert tracker.run_id("t0009") is None


def test_another_tracker_knows_the_runs_without_asking_mlflow(folder, uri):
    start_sweep(folder)
    ship(folder, uri)
    again = Tracker(folder, uri, EXPERIMENT, SWEEP_ID)
    assert again.run_id("t0000") == runs(uri)["t0000"].info.run_id
    assert again.pending() == 0
    elsewhere = Tracker(folder, f"{uri}.other", EXPERIMENT, SWEEP_ID)
    assert elsewhere.run_id("t0000") is None
    assert elsewhere.pending() == 2


def test_metrics_without_a_start_record_make_the_run_and_a_later_start_names_it(folder, uri):
    write_steps(folder, "t0000", 0, 3)
    ship(folder, uri)
    assert runs(uri)["t0000"].data.tags["mlflow.parentRunId"] == runs(uri)["sweep"].info.run_id
    with writer(folder, "t0000", "driver") as trial:
        trial.start("the first", {"a": "b"}, {"p": 1}, "sweep")
    ship(folder, uri)
    run = runs(uri)["t0000"]
    assert (run.info.run_name, run.data.tags["a"], run.data.params) == ("the first", "b", {"p": "1"})


def test_a_worker_whose_clock_is_behind_does_not_come_before_the_runs_start(folder, uri):
    write_steps(folder, "best", 0, 3)
    with writer(folder, "best", "driver") as driver:
        driver.start("the best", {"dtr_ray.kind": "best"}, {}, None)
    ship(folder, uri)
    found = runs(uri)
    assert list(found) == ["best"]
    assert found["best"].data.tags["dtr_ray.kind"] == "best"
    assert "mlflow.parentRunId" not in found["best"].data.tags


def test_a_start_after_an_end_reopens_the_run(folder, uri):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 5)
    with writer(folder, "t0000", "driver") as trial:
        trial.end("FAILED")
    ship(folder, uri)
    first = runs(uri)["t0000"]
    assert first.info.status == "FAILED"
    with writer(folder, "t0000", "driver") as trial:
        trial.start("t0000", {}, {"routing.alpha": 0}, "sweep")
    ship(folder, uri)
    again = runs(uri)["t0000"]
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "RUNNING")
    assert again.data.tags["dtr_ray.status"] == "running"
    write_steps(folder, "t0000", 3, 8)
    with writer(folder, "t0000", "driver") as trial:
        trial.end("FINISHED")
    ship(folder, uri)
    run = runs(uri)["t0000"]
    assert (run.info.status, run.data.tags["dtr_ray.status"]) == ("FINISHED", "completed")
    assert history(uri, run.info.run_id) == list(range(8))


def test_a_running_tracker_sends_what_is_appended(folder, uri):
    tracker = Tracker(folder, uri, EXPERIMENT, SWEEP_ID, poll_s=0.05)
    started = time.monotonic()
    tracker.start()
    assert time.monotonic() - started < 0.5
    start_sweep(folder)
    for first in range(0, 30, 10):
        write_steps(folder, "t0000", first, first + 10)
        deadline = time.monotonic() + 30
        while tracker.pending() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert history(uri, tracker.run_id("t0000")) == list(range(first + 10))
    assert tracker.close(5.0) == 0


def test_artifacts_arrive_and_a_missing_one_is_set_aside(folder, uri, caplog):
    start_sweep(folder)
    (folder / "grid 1.png").write_bytes(b"png")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    with writer(folder, "t0000") as worker:
        worker.artifact("grid 1.png", "samples")
        worker.artifact("missing.png", "samples")
        worker.artifact("export", "model")
        worker.metrics(1, {"loss": 1.0})
    ship(folder, uri)
    run = runs(uri)["t0000"]
    paths = [
        a.path for place in ("samples", "model") for a in client(uri).list_artifacts(run.info.run_id, place)
    ]
    assert paths == ["samples/grid 1.png", "model/config.json"]
    assert (folder.parent / "mlartifacts" / EXPERIMENT).is_dir()
    assert history(uri, run.info.run_id) == [1]
    (rejected,) = (folder / "tracking" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["refused"]["path"] == "missing.png"
    assert "missing.png does not exist" in caplog.text


def test_what_mlflow_refuses_is_set_aside_and_blocks_nothing(folder, uri, caplog):
    start_sweep(folder)
    with writer(folder, "t0000") as worker:
        for step in range(30):
            worker.metrics(step, {"loss": 1.0, **({"bad key!*": 2.0} if step in (3, 17) else {})})
        worker.params({"routing.alpha": 99, "other": 1})
        worker.tags({"k" * 300: "too long", "fine": "yes"})
        worker.end("FINISHED")
    ship(folder, uri)
    run = runs(uri)["t0000"]
    assert history(uri, run.info.run_id) == list(range(30))
    assert run.data.params == {"routing.alpha": "0", "other": "1"}
    assert (run.data.tags["fine"], run.info.status) == ("yes", "FINISHED")
    lines = (folder / "tracking" / "rejected.jsonl").read_text().splitlines()
    refused = [json.loads(line)["refused"] for line in lines]
    assert [(r["key"], r["step"]) for r in refused] == [
        ("bad key!*", 3),
        ("bad key!*", 17),
        ("routing.alpha", 0),
        ("k" * 300, 0),
    ]
    assert caplog.text.count("MLflow refused") == 1


def test_a_damaged_line_is_set_aside(folder, uri):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 2)
    with record_path(folder, "t0000", "worker").open("ab") as file:
        file.write(b'\0\0\n{"kind":"metrics","time_ms":1}\n')
    write_steps(folder, "t0000", 2, 4)
    ship(folder, uri)
    assert history(uri, runs(uri)["t0000"].info.run_id) == [0, 1, 2, 3]
    assert len((folder / "tracking" / "rejected.jsonl").read_text().splitlines()) == 2


def test_a_run_deleted_by_hand_takes_nothing_and_blocks_nothing(folder, uri):
    start_sweep(folder, trials=2)
    tracker = ship(folder, uri)
    client(uri).delete_run(tracker.run_id("t0000"))
    write_steps(folder, "t0000", 0, 200)
    write_steps(folder, "t0001", 0, 3)
    ship(folder, uri)
    assert history(uri, tracker.run_id("t0001")) == [0, 1, 2]
    assert len((folder / "tracking" / "rejected.jsonl").read_text().splitlines()) == 400


def test_more_than_one_batch_and_portion_arrive_whole(folder, uri):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 8_000)
    with writer(folder, "t0000") as worker:
        worker.params({f"p{number}": number for number in range(250)})
        worker.tags({f"tag{number}": number for number in range(250)})
    assert record_path(folder, "t0000", "worker").stat().st_size > 600_000
    ship(folder, uri, timeout_s=90)
    run = runs(uri)["t0000"]
    assert history(uri, run.info.run_id) == list(range(8_000))
    assert len(run.data.params) == 251
    assert run.data.tags["tag249"] == "249"


def test_non_finite_values_show_as_a_tag(folder, uri):
    start_sweep(folder)
    with writer(folder, "t0000") as worker:
        worker.metrics(1, {"loss": 1.0})
        worker.metrics(2, {"loss": float("nan")})
        worker.metrics(3, {"loss": float("inf")})
    ship(folder, uri)
    run = runs(uri)["t0000"]
    assert history(uri, run.info.run_id) == [1]
    assert run.data.tags["dtr_ray.non_finite.loss"] == "2 values, the first at step 2, the last inf"


@pytest.mark.parametrize("state", [None, b"", b"{", b"[]"])
def test_a_lost_or_damaged_state_file_doubles_nothing(folder, uri, state):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 20)
    first = ship(folder, uri).run_id("t0000")
    path = folder / "tracking" / "state.json"
    if state is None:
        path.unlink()
    else:
        path.write_bytes(state)
    write_steps(folder, "t0000", 20, 30)
    assert ship(folder, uri).run_id("t0000") == first
    assert history(uri, runs(uri)["t0000"].info.run_id) == list(range(30))


def test_a_second_run_made_by_a_lost_request_is_removed(folder, uri):
    start_sweep(folder)
    ship(folder, uri)
    original = runs(uri)["t0000"]
    mlflow = client(uri)
    mlflow.create_run(original.info.experiment_id, tags=original.data.tags)
    (folder / "tracking" / "state.json").unlink()
    with writer(folder, "t0000", "driver") as trial:
        trial.end("FINISHED")
    ship(folder, uri)
    active = mlflow.search_runs([original.info.experiment_id], "tags.`dtr_ray.run_key` = 't0000'")
    assert [(run.info.run_id, run.info.status) for run in active] == [(original.info.run_id, "FINISHED")]


SHIP = """
    import sys
    from pathlib import Path
    import mlflow
    from dtr_ray.service.tracking import Tracker
    tracker = Tracker(Path(sys.argv[1]), sys.argv[2], "digits", "sweep-1", poll_s=0.01)
    print("go", flush=True)
    tracker.start()
    print(tracker.close(60.0), flush=True)
"""


@pytest.mark.slow
def test_a_shipper_killed_at_random_moments_sends_everything_once(folder, tmp_path):
    rng = random.Random(0)
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    start_sweep(folder, trials=2)
    command = [sys.executable, "-c", textwrap.dedent(SHIP), str(folder), uri]
    kills = 0
    for attempt in range(5):
        for number in range(2):
            write_steps(folder, f"t{number:04}", attempt * 1500, (attempt + 1) * 1500)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"go\n"
            # The first kill falls into the making of the database's tables.
            time.sleep(rng.uniform(0.0, 1.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert kills >= 3
    for number in range(2):
        with writer(folder, f"t{number:04}", "driver") as trial:
            trial.end("FINISHED")
    ship(folder, uri, timeout_s=90)
    found = runs(uri)
    assert sorted(found) == ["sweep", "t0000", "t0001"]
    for number in range(2):
        assert history(uri, found[f"t{number:04}"].info.run_id) == list(range(7500))


def test_close_gives_up_in_time_and_says_how_much_waits(folder, caplog):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 10)
    nowhere = f"http://user:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(folder, nowhere, EXPERIMENT, SWEEP_ID, poll_s=0.05)
    assert tracker.pending() == 12
    tracker.start()
    started = time.monotonic()
    assert tracker.close(3.0) == 12
    assert time.monotonic() - started < 4.0
    assert caplog.text.count("takes no records now") == 1
    assert "user:secret" not in caplog.text


def test_a_server_that_never_answers_holds_up_nobody(folder, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    start_sweep(folder)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracker = Tracker(folder, address, EXPERIMENT, SWEEP_ID, poll_s=0.05)
        tracker.start()
        started = time.monotonic()
        assert tracker.close(3.0) == 2
        assert time.monotonic() - started < 4.0
    assert caplog.text.count("takes no records now") == 1


def test_a_locked_database_is_waited_for(folder, uri, tmp_path, caplog):
    start_sweep(folder)
    ship(folder, uri)
    write_steps(folder, "t0000", 0, 10)
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(folder, uri, EXPERIMENT, SWEEP_ID, poll_s=0.05)
    tracker.start()
    time.sleep(1.0)
    assert tracker.pending() == 10
    lock.execute("COMMIT")
    lock.close()
    assert tracker.close(30.0) == 0
    assert history(uri, tracker.run_id("t0000")) == list(range(10))


def test_records_from_before_the_server_was_up_and_across_its_death_arrive_once(folder, server, caplog):
    caplog.set_level(logging.INFO)
    start_sweep(folder, trials=2)
    (folder / "grid.png").write_bytes(b"png")
    with writer(folder, "t0001") as worker:
        worker.artifact("grid.png", "samples")
    tracker = Tracker(folder, server.uri, EXPERIMENT, SWEEP_ID, poll_s=0.05, max_backoff_s=1.0)
    tracker.start()
    write_steps(folder, "t0000", 0, 3000)
    server.start()
    server.wait()
    deadline = time.monotonic() + 60
    # In the middle of shipping: the first records are there, the last are not.
    while tracker.run_id("t0000") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    server.kill()
    left = tracker.pending()
    write_steps(folder, "t0000", 2990, 4000)
    with writer(folder, "t0000", "driver") as trial:
        trial.end("FINISHED")
    server.start()
    server.wait()
    assert tracker.close(60.0) == 0
    assert left > 0
    found = runs(server.uri)
    assert sorted(found) == ["sweep", "t0000", "t0001"]
    assert history(server.uri, found["t0000"].info.run_id) == list(range(4000))
    assert found["t0000"].info.status == "FINISHED"
    assert [a.path for a in client(server.uri).list_artifacts(found["t0001"].info.run_id, "samples")] == [
        "samples/grid.png"
    ]
    assert 1 <= caplog.text.count("takes no records now") <= 2
    assert caplog.text.count("takes records again") == caplog.text.count("takes no records now")
    check_idempotent(server.uri)


def test_what_an_earlier_sweep_left_is_sent(folder, uri):
    start_sweep(folder)
    write_steps(folder, "t0000", 0, 10)
    assert send_waiting(folder, uri, EXPERIMENT, SWEEP_ID, timeout_s=30.0) == 0
    assert history(uri, runs(uri)["t0000"].info.run_id) == list(range(10))


def test_a_sweep_id_that_would_break_a_query_is_refused(folder, uri):
    with pytest.raises(ValueError, match="it's"):
        Tracker(folder, uri, EXPERIMENT, "it's")


def test_the_tracking_uri_is_the_environments_or_sqlite_in_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_tracking_uri(Path("runs")) == "http://mlflow:5000"
    assert default_artifact_location("http://mlflow:5000", "x") is None


def test_the_command_to_look_at_the_runs_is_one_to_type():
    assert (
        ui_command("sqlite:////data/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////data/mlflow.db"
    )
    assert ui_command("sqlite:////my data/m.db") == "mlflow ui --backend-store-uri 'sqlite:////my data/m.db'"
    assert ui_command("http://mlflow:5000") == "http://mlflow:5000"


@pytest.mark.slow
def test_a_server_that_comes_back_with_an_empty_database_is_told_everything_again(
    folder, server, tmp_path, empty_database, caplog
):
    start_sweep(folder, trials=3)
    (folder / "grid.png").write_bytes(b"png")
    with writer(folder, "t0001") as worker:
        worker.artifact("grid.png", "samples")
    for number in range(3):
        write_steps(folder, f"t{number:04}", 0, 500)
    with writer(folder, "t0000", "driver") as ended:
        ended.tags({"dtr_ray.status": "completed"})
        ended.end("FINISHED")
    server.start()
    server.wait()
    tracker = Tracker(folder, server.uri, EXPERIMENT, SWEEP_ID, poll_s=0.05, max_backoff_s=1.0)
    tracker.start()
    wait_for(lambda: tracker.pending() == 0)
    before = runs(server.uri)
    server.kill()
    shutil.copyfile(empty_database, tmp_path / "server.db")
    shutil.rmtree(tmp_path / "artifacts")
    server.start()
    server.wait()
    write_steps(folder, "t0002", 500, 600)
    wait_for(lambda: tracker.run_id("t0000") not in (None, before["t0000"].info.run_id))
    assert tracker.close(60.0) == 0
    found = runs(server.uri)
    assert sorted(found) == ["sweep", "t0000", "t0001", "t0002"]
    ids = {key: run.info.run_id for key, run in found.items()}
    assert set(ids.values()).isdisjoint(run.info.run_id for run in before.values())
    for number, steps in enumerate((500, 500, 600)):
        assert history(server.uri, ids[f"t{number:04}"]) == list(range(steps))
        assert found[f"t{number:04}"].data.params == {"routing.alpha": str(number)}
        assert found[f"t{number:04}"].data.tags["mlflow.parentRunId"] == ids["sweep"]
    assert found["t0000"].info.status == "FINISHED"
    assert found["t0000"].data.tags["dtr_ray.status"] == "completed"
    assert [a.path for a in client(server.uri).list_artifacts(ids["t0001"], "samples")] == [
        "samples/grid.png"
    ]
    assert caplog.text.count("all its records are sent again") == 1


def test_a_database_that_was_emptied_after_the_sweep_is_told_everything_again(
    folder, uri, tmp_path, empty_database
):
    start_sweep(folder, trials=2)
    write_steps(folder, "t0001", 0, 50)
    ship(folder, uri)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    tracker = ship(folder, uri)
    assert sorted(runs(uri)) == ["sweep", "t0000", "t0001"]
    assert history(uri, tracker.run_id("t0001")) == list(range(50))


def wait_for(condition, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
