"""The tracking server of docker/ by hand: MLflow with passwords over PostgreSQL, artifacts through it."""

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from postgres import PASSWORD, Postgres
from service.mlflow_server import SETTINGS, free_port

ROOT = Path(__file__).parents[1]
USER = "sweeper"
SECRETS = {
    "postgres_password": PASSWORD,
    "admin_password": "pl4nted-s3cret-of-the-admin",
    "flask_key": secrets.token_hex(16),
}
USERS_PASSWORD = "pl4nted-s3cret-of-a-user"


class TrackingServer:
    """docker/tracking.sh by hand: MLflow with passwords over PostgreSQL, artifacts through it."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        (folder / "secrets").mkdir(parents=True)
        for name, value in SECRETS.items():
            (folder / "secrets" / name).write_text(value)
        for name in ("mlflow", "mlflow_auth"):
            postgres.make_database(name)
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            **SETTINGS,
            "TRACKING_PORT": str(self.port),
            "TRACKING_WORKERS": "1",
            "TRACKING_SECRETS": str(folder / "secrets"),
            "TRACKING_DATABASE": postgres.url("mlflow", None, "postgresql+psycopg2"),
            "TRACKING_AUTH_DATABASE": postgres.url("mlflow_auth", None, "postgresql+psycopg2"),
            "TRACKING_ARTIFACTS": str(folder / "artifacts"),
        }

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [shutil.which("bash") or "/bin/bash", str(ROOT / "docker/tracking.sh")],
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < end, self.log.read_text()[-3000:]
                time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def add_user(self) -> None:
        token = base64.b64encode(f"admin:{SECRETS['admin_password']}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
        body = json.dumps({"username": USER, "password": USERS_PASSWORD}).encode()
        address = f"{self.uri}/api/2.0/mlflow/users/create"
        urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60).close()
