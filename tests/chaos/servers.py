"""The MLflow server of the small world: over PostgreSQL, on a machine of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from postgres import Postgres
from service.mlflow_server import start_server

PORT = 5000


class Tracking:
    """`mlflow server`, which can be killed, stopped, hung and started."""

    def __init__(self, folder: Path, postgres: Postgres, enter: Sequence[str], host: str) -> None:
        self._folder, self._postgres, self._enter, self._host = folder, postgres, [*enter], host
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        postgres.make_database("mlflow")
        self.uri = f"http://{host}:{PORT}"

    @property
    def store(self) -> str:
        """Its database, as this host reaches it."""
        return self._postgres.local_url("mlflow")

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self._process = start_server(
            self._folder / "log",
            self._host,
            PORT,
            self.store,
            self._folder / "artifacts",
            *("--allowed-hosts", "*", "--serve-artifacts"),
            enter=self._enter,
        )
        end = time.monotonic() + 90
        while not self.answers():
            assert self.is_up, self.log[-3000:]
            assert time.monotonic() < end, self.log[-3000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        ask = ["curl", "-s", "-m", "5", "-o", "/dev/null", f"{self.uri}/health"]
        return subprocess.run([*self._enter, *ask], check=False).returncode == 0

    def signal(self, signum: int) -> None:
        """To it and its workers."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """In good order, as far as it ends in 20 s."""
        assert self._process is not None
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()

    def restore(self) -> None:
        if self.is_up:
            self.signal(signal.SIGCONT)
        else:
            self.start()
