"""A real MLflow server in a process of its own, for tests."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Environment of every server: without what only the server's own jobs need it starts twice as fast."""


def start_server(
    log: Path, host: str, port: int, store: str, artifacts: Path, *options: str, enter: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """`mlflow server` with one worker, in a session of its own; `enter`: words before the command."""
    words = ["--host", host, "--port", str(port), "--workers", "1", *options]
    words += ["--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*enter, sys.executable, "-m", "mlflow", "server", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **SETTINGS},
            start_new_session=True,
        )


class MlflowServer:
    """One worker on a loopback port, over a SQLite file; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self._folder / 'server.db'}", self._folder / "artifacts"
        log = self._folder / "server.log"
        self._process = start_server(log, "127.0.0.1", self.port, store, artifacts)

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until it answers."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL, to its workers too."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
