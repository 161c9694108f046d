"""A real PostgreSQL of Debian's package in a folder of its own, which tests may stop, kill and start."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from service.mlflow_server import free_port

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
PASSWORD = "pl4nted-s3cret-of-the-database"
USER = "dtr_ray"


class Postgres:
    """One server on a loopback port, which asks for a password; it never runs as root."""

    def __init__(self, enter: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        """`enter`: a command that runs another in the network where `host` is its address."""
        self._enter = [*enter]
        self.host = host
        # The user postgres may enter no folder of pytest's.
        self.folder = Path(tempfile.mkdtemp(prefix="dtr-ray-postgres-"))
        self.port = free_port()
        self.running = False
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (self.folder, secret):
                shutil.chown(path, "postgres", "postgres")
        arguments = ["-D", self._data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        self._run("initdb", *arguments)
        if host != "127.0.0.1":
            with (self._data / "pg_hba.conf").open("a") as file:
                file.write("host all all all scram-sha-256\n")

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str, password: str | None = PASSWORD, scheme: str = "postgresql") -> str:
        user = USER if password is None else f"{USER}:{password}"
        return f"{scheme}://{user}@{self.host}:{self.port}/{database}"

    def local_url(self, database: str) -> str:
        """The same through its socket: from this host, whatever network it is in."""
        return f"postgresql+psycopg2://{USER}:{PASSWORD}@/{database}?host={self.folder}&port={self.port}"

    def start(self) -> None:
        options = (
            f"-c listen_addresses={self.host} -c port={self.port} -c unix_socket_directories={self.folder}"
        )
        # A test's machine loses no power, and its disk may be slow.
        self._run("pg_ctl", "-D", self._data, "-w", "-l", self.folder / "log", "-o", f"{options} -F", "start")
        self.running = True

    def stop(self, mode: str = "immediate") -> None:
        """At once, without good-bye to its clients; `fast` takes its leave."""
        self._run("pg_ctl", "-D", self._data, "-m", mode, "-w", "stop")
        self.running = False

    def kill(self) -> None:
        """SIGKILL to all its processes: it has to recover when it starts again."""
        first = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        for pid in [first, *map(int, children)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while any(Path(f"/proc/{pid}/stat").exists() for pid in [first, *children]):
            time.sleep(0.02)
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self.running = False

    def make_database(self, name: str) -> str:
        """Makes an empty database; returns its address, with the password."""
        self.query(f'CREATE DATABASE "{name}"', "postgres")
        return self.url(name)

    def query(self, sql: str, database: str) -> list[str]:
        assert BINARIES is not None
        command = [
            BINARIES / "psql",
            "-h",
            self.folder,
            "-p",
            str(self.port),
            "-U",
            USER,
            "-d",
            database,
            "-Atc",
        ]
        done = subprocess.run(
            [*command, sql],
            env={**os.environ, "PGPASSWORD": PASSWORD},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines()

    def remove(self) -> None:
        if self.running:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: object) -> None:
        assert BINARIES is not None
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] * (os.geteuid() == 0)
        command = [*self._enter, *become, str(BINARIES / program), *map(str, arguments)]
        # Its server inherits the pipes of who starts it, and would keep a reader waiting.
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            log = self.folder / "log"
            raise RuntimeError(
                f"{program} ended with {done.returncode}: {log.read_text() if log.exists() else ''}"
            )
