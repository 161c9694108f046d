"""A stand-in for S3: moto's server as a process, which can be stopped, and started again with what it had."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "pl4nted-s3cret-of-the-store",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "sweeps"


class S3:
    """A server with one bucket; while it is frozen it answers nobody, and forgets nothing."""

    def __init__(self, log: Path, host: str = "127.0.0.1", port: int | None = None) -> None:
        self.address = f"{host}:{port or _free_port()}"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", host, "-p", self.address.rpartition(":")[2]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        end = time.monotonic() + 30
        while True:
            try:
                self.request("PUT", BUCKET)
                return
            except urllib.error.URLError:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://{self.address}"}

    def url(self, folder: str) -> str:
        return f"s3://{BUCKET}/{folder}"

    def request(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"http://{self.address}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait()


@contextmanager
def s3_server(log: Path) -> Iterator[S3]:
    """The server, and its keys in this process's environment."""
    server = S3(log)
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
