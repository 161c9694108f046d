"""Planted secrets are looked for in all that a live sweep, train_best and the doctor print, keep and send.

In two to four minutes: pytest tests/service/test_live_secrets.py -m slow -n 0 -s
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from postgres import BINARIES, PASSWORD, USER, Postgres
from tiny_sweeps import ROOT, SweepCommand, folder_of, records, tiny_sweep, wait_until
from tracking_server import SECRETS, USERS_PASSWORD, TrackingServer
from tracking_server import USER as MLFLOW_USER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BINARIES is None, reason="needs Debian's postgresql"),
    pytest.mark.skipif(
        importlib.util.find_spec("flask_wtf") is None, reason="needs Flask-WTF, for MLflow's passwords"
    ),
]

OTHERS = {
    name: f"pl4nted-{name.lower().replace('_', '-')}"
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
}
TOKEN = "0123456789abcdef" * 4
"""Ray's, of the form that Ray makes."""
PLANTED = {"study": PASSWORD, "mlflow": USERS_PASSWORD, "ray": TOKEN, **SECRETS, **OTHERS}


@pytest.fixture
def server(postgres: Postgres, tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path / "server", postgres)
    server.start()
    try:
        server.wait()
        server.add_user()
        yield server
    finally:
        server.kill()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray's processes log: a short path, since it holds sockets."""
    folder = Path(tempfile.mkdtemp(prefix="dtr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def held_by(content: bytes) -> set[str]:
    return {name for name, secret in PLANTED.items() if secret.encode() in content}


def holders(folder: Path) -> dict[str, set[str]]:
    """The files below a folder that hold secrets, and which."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {path.relative_to(folder).as_posix(): held_by(path.read_bytes()) for path in files}
    return {name: secrets for name, secrets in found.items() if secrets}


def dump(postgres: Postgres, database: str) -> bytes:
    assert BINARIES is not None
    command = [BINARIES / "pg_dump", "-h", "127.0.0.1", "-p", str(postgres.port), "-U", USER, database]
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    return subprocess.run(command, env=environment, check=True, capture_output=True).stdout


def type_in(folder: Path, environment: dict[str, str], *words: str) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_nothing_that_a_sweep_prints_keeps_or_sends_holds_a_secret(
    postgres: Postgres, server: TrackingServer, ray_folder: Path, shared_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    config = tiny_sweep(
        output,
        storage__study=postgres.make_database("optuna"),
        tracking__uri=server.uri.replace("//", f"//{MLFLOW_USER}:{USERS_PASSWORD}@"),
        search={"sampler": "points", "starting_points": [{"training.lr": [3e-3, 1e30]}]},
        space={"training.lr": {"type": "loguniform", "low": 1e-4, "high": 1e30}},
        trial__training__num_steps=200,
        trial__evaluation__every_steps=50,
        early_stopping={"name": "none"},
    )
    environment = {**OTHERS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(ray_folder)}
    for interrupted in (True, False):
        command = SweepCommand(config, "--resume", **environment)
        try:
            if interrupted:
                # Errors of both servers, and a kill: each leaves its lines.
                wait_until(lambda: any(t.reports for t in records(folder_of(config)).values()), 120)
                server.kill()
                postgres.kill()
                time.sleep(5)
                command.end()
                postgres.start()
                server.start()
                server.wait()
            else:
                assert command.wait(300) == 0, command.output
        finally:
            command.end()
    statuses = {t.trial_id: t.status for t in records(folder_of(config)).values()}
    assert sorted(statuses.values()) == ["completed", "failed"]

    space = output / f"{config.name}.yaml"
    environment["DTR_RAY_STUDY_PASSWORD"] = PASSWORD
    environment |= {"MLFLOW_TRACKING_USERNAME": MLFLOW_USER, "MLFLOW_TRACKING_PASSWORD": USERS_PASSWORD}
    best = ("dtr_ray.train_best", str(folder_of(config)), "--set", "training.num_steps=250")
    printed = type_in(tmp_path, environment, *best)
    printed += type_in(tmp_path, environment, "dtr_ray.doctor", str(space))

    assert held_by(printed.encode()) == set()
    # Of all files, what the sweep has printed among them, only the one in which the user has written them.
    assert holders(output) == {space.name: {"study", "postgres_password", "mlflow"}}
    logs = holders(ray_folder)
    assert len(list(ray_folder.rglob("*.log"))) > 5
    assert logs == {}
    kept = {name: held_by(dump(postgres, name)) for name in ("mlflow", "optuna")}
    assert kept == {"mlflow": set(), "optuna": set()}
    assert holders(server.folder / "artifacts") == {}
    client = MlflowClient(server.uri.replace("//", f"//{MLFLOW_USER}:{USERS_PASSWORD}@"))
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 4
