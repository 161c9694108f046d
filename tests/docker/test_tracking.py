"""The tracking server's steps by hand: install.sh into an empty environment, secrets, databases, tracking.sh.

As root (for the user postgres), in minutes: pytest tests/docker -m slow -n 0 -s --timeout 1800
"""

import base64
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash") or "/bin/bash"
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
S3_STAND_IN = "moto[s3]==5.2.1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(POSTGRES is None, reason="needs Debian's postgresql"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become the user postgres"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server in its own process group, which ends with the block."""
    with log.open("ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        yield server
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment made by the image's own step, as the image makes it: from nothing."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    path = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    path.pop("PYTHONPATH", None)
    subprocess.run([BASH, ROOT / "docker/install.sh", "tracking-python"], env=path, check=True)
    # In the place of the compose file's store, which has no package here.
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", S3_STAND_IN], check=True)
    return folder


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([BASH, ROOT / "docker/make_secrets.sh", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, secrets: Path) -> Iterator[int]:
    """A PostgreSQL that asks for the password; its port."""
    assert POSTGRES is not None
    folder, port = Path("/tmp") / f"dtr-ray-postgres-{os.getpid()}", free_port()
    folder.mkdir(mode=0o700)
    shutil.chown(folder, "postgres", "postgres")
    password = folder / "password"
    password.write_text((secrets / "postgres_password").read_text())
    shutil.chown(password, "postgres", "postgres")

    def become(*command: object) -> list[str]:
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *map(str, command)]

    data = folder / "data"
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    try:
        init = become(
            POSTGRES / "initdb", "-D", data, "-U", "dtr_ray", "-A", "scram-sha-256", f"--pwfile={password}"
        )
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        control = become(POSTGRES / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        subprocess.run(control, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        query = "CREATE DATABASE mlflow;" + (ROOT / "docker/databases.sql").read_text().split("\n", 1)[1]
        with_password = {**os.environ, "PGPASSWORD": password.read_text()}
        psql = [POSTGRES / "psql", "-h", "127.0.0.1", "-p", str(port), "-U", "dtr_ray", "-d", "postgres"]
        subprocess.run(psql, input=query.encode(), env=with_password, check=True, stdout=subprocess.DEVNULL)
        yield port
    finally:
        subprocess.run(
            become(POSTGRES / "pg_ctl", "-D", data, "-m", "immediate", "stop"), check=False, cwd="/"
        )
        shutil.rmtree(folder)


def call(url: str, body: Any = None, password: str | None = None) -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if password is not None:
        request.add_header(
            "Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()
        )
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.loads(answer.read() or b"null")


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)


@pytest.fixture
def settings(environment: Path, secrets: Path, database: int) -> dict[str, str]:
    """What compose.yaml sets, with this machine's addresses."""
    return {
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "HOME": str(environment),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKING_PORT": str(free_port()),
        "TRACKING_WORKERS": "1",
        "TRACKING_SECRETS": str(secrets),
        "TRACKING_DATABASE": f"postgresql+psycopg2://dtr_ray@127.0.0.1:{database}/mlflow",
        "TRACKING_AUTH_DATABASE": f"postgresql+psycopg2://dtr_ray@127.0.0.1:{database}/mlflow_auth",
        "TRACKING_ARTIFACTS": "s3://mlflow/artifacts",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "s3_credentials"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def test_secrets_are_random_kept_and_only_for_their_owner(secrets: Path):
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert len(set(before.values())) == len(before) == 5
    assert (
        json.loads(before["s3.json"])["identities"][0]["credentials"][0]["secretKey"]
        in before["s3_credentials"]
    )
    subprocess.run([BASH, ROOT / "docker/make_secrets.sh", secrets], check=True)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


def test_the_server_keeps_records_and_artifacts_over_a_restart_and_refuses_strangers(
    settings: dict[str, str], environment: Path, secrets: Path, tmp_path: Path
):
    password = (secrets / "admin_password").read_text()
    url, log = f"http://127.0.0.1:{settings['TRACKING_PORT']}", tmp_path / "log"
    store_port = settings["MLFLOW_S3_ENDPOINT_URL"].rpartition(":")[2]
    moto = [str(environment / "bin/moto_server"), "-H", "127.0.0.1", "-p", store_port]
    command = [BASH, str(ROOT / "docker/tracking.sh")]
    api = f"{url}/api/2.0/mlflow"
    with process(moto, tmp_path / "store.log") as store:
        wait_for(settings["MLFLOW_S3_ENDPOINT_URL"], store, tmp_path / "store.log")
        with process(command, log, env=settings, cwd=tmp_path) as server:
            wait_for(f"{url}/health", server, log)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                call(f"{api}/experiments/get?experiment_id=0")
            experiment = call(f"{api}/experiments/create", {"name": "e"}, password)["experiment_id"]
            run = call(f"{api}/runs/create", {"experiment_id": experiment}, password)["run"]["info"]
            metric = {"run_id": run["run_id"], "key": "fid", "value": 3.5, "timestamp": 1, "step": 1}
            call(f"{api}/runs/log-metric", metric, password)
            assert run["artifact_uri"].startswith("mlflow-artifacts:/")
            log_artifact(environment, url, password, run["run_id"], tmp_path)
            # Nothing secret where other users of the machine could read it.
            seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            assert not [s for s in secret_values(secrets) if s in seen]
        with process(command, log, env=settings, cwd=tmp_path) as server:
            wait_for(f"{url}/health", server, log)
            kept = call(f"{api}/runs/get?run_id={run['run_id']}", None, password)["run"]["data"]["metrics"]
            assert [(m["key"], m["value"]) for m in kept] == [("fid", 3.5)]
            listed = call(f"{api}/artifacts/list?run_id={run['run_id']}", None, password)
            assert [f["path"] for f in listed["files"]] == ["note.txt"]
    assert not [s for s in secret_values(secrets) if s in log.read_text()]


def secret_values(secrets: Path) -> list[str]:
    return [(secrets / name).read_text() for name in ("postgres_password", "admin_password", "flask_key")]


def log_artifact(environment: Path, url: str, password: str, run: str, folder: Path) -> None:
    """By MLflow's own client, which knows the server and not the store."""
    (folder / "note.txt").write_text("hello")
    client = {
        "MLFLOW_TRACKING_URI": url,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    line = "import sys, mlflow; mlflow.MlflowClient().log_artifact(sys.argv[1], sys.argv[2])"
    command = [environment / "bin/python", "-c", line, run, str(folder / "note.txt")]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **client}, check=True)
