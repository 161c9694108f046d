"""MLflow's SQLite file is there whole or not at all."""

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

from dtr_ray.service.mlflow_client import connect, sqlite_path

CONNECT = """
    import sys
    import mlflow
    from dtr_ray.service.mlflow_client import connect
    print("go", flush=True)
    connect(sys.argv[1]).search_experiments()
"""


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path):
    path = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", textwrap.dedent(CONNECT), f"sqlite:///{path}"]
    draft = tmp_path / ".mlflow.db.draft" / "made.db"
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        # Large enough for the migrations to be under way, from which MLflow's own file never recovers.
        while not draft.exists() or draft.stat().st_size < 300_000:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not path.exists()
    assert connect(f"sqlite:///{path}").search_experiments()[0].name == "Default"
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_several_that_connect_at_once_get_one_database(tmp_path):
    uri = f"sqlite:///{tmp_path / 'deep' / 'mlflow.db'}"
    with ThreadPoolExecutor(3) as pool:
        clients = list(pool.map(connect, [uri] * 3))
    clients[0].create_experiment("x")
    assert all(client.get_experiment_by_name("x") is not None for client in clients)


def test_a_database_that_is_there_is_left_alone(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    connect(uri).create_experiment("x")
    assert connect(uri).get_experiment_by_name("x") is not None


def test_only_a_sqlite_uri_names_a_file(tmp_path):
    assert sqlite_path(f"sqlite:///{tmp_path}/a b.db") == tmp_path / "a b.db"
    assert sqlite_path("http://mlflow:5000") is None
