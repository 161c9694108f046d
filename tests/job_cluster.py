"""A cluster that takes jobs, as `ray up` would start it, and a machine that submits sweeps to it."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.job_submission import JobSubmissionClient
from tiny_sweeps import ROOT, wait_until

# Answers each line with the trials that run, by sweep.
_WATCH = """
import json, sys
import ray
from dtr_ray.service import claims
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps(ray.get_runtime_context().gcs_address), flush=True)
for _ in sys.stdin:
    print(json.dumps({claim.name: claim.running for claim in claims._others("")}), flush=True)
"""


class Laptop:
    """A folder from which sweeps are submitted, without the cluster's own variables."""

    def __init__(self, folder: Path, cluster: "Cluster") -> None:
        folder.mkdir()
        self.folder = folder
        own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "DTR_RAY_CACHE")}
        there = {"RAY_API_SERVER_ADDRESS": cluster.server, **cluster.access}
        self._environment = {**own, **there, "PYTHONPATH": str(ROOT)}
        self._begun: list[subprocess.Popen[str]] = []

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """`python -m dtr_ray.sweep WORDS`; what it prints goes to a file."""
        log = self._log(len(self._begun)).open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "dtr_ray.sweep", *words],
            cwd=self.folder,
            env={**self._environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log.close()
        self._begun.append(process)
        return process

    def printed(self, process: subprocess.Popen[str]) -> str:
        return self._log(self._begun.index(process)).read_text(encoding="utf-8")

    def _log(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def do(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command that ends."""
        process = self.start(*words, **environment)
        code = process.wait(600.0)
        return code, self.printed(process)

    def wait_for(self, process: subprocess.Popen[str], words: str) -> None:
        def there() -> bool:
            printed = self.printed(process)
            assert words in printed or process.poll() is None, printed
            return words in printed

        wait_until(there, 300.0, f"{words!r} of {process.args}")

    def end(self) -> None:
        for process in self._begun:
            process.kill()
            process.wait()


class Cluster:
    """A head of its own, with a token, started as `ray up` would.

    Ray's supervisor of jobs finds its cluster through what `ray start` leaves in the temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.folder = folder
        self._begun: list[subprocess.Popen[str]] = []
        gcs, client, server, agent = free_ports(4)
        self.gcs, self.client, self.server = (
            f"127.0.0.1:{gcs}",
            f"ray://127.0.0.1:{client}",
            f"http://127.0.0.1:{server}",
        )
        options = f"--head --block --node-ip-address=127.0.0.1 --port={gcs} --ray-client-server-port={client}"
        options += f" --dashboard-port={server} --dashboard-agent-listen-port={agent} --temp-dir={folder}"
        options += " --num-cpus=2 --num-gpus=0 --object-store-memory=200000000"
        try:
            self._bring_up(options.split(), token.read_text())
        except BaseException:
            self.end()
            raise

    def _bring_up(self, options: list[str], token: str) -> None:
        self._start(str(Path(sys.executable).parent / "ray"), "start", *options)
        wait_until(lambda: (self.folder / "ray_current_cluster").exists(), 120.0, "a head")
        headers = {"Authorization": f"Bearer {token}"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_API_SERVER_ADDRESS", self.server)
            self.jobs = JobSubmissionClient(self.server, headers=headers)
        self._watch = self._start(sys.executable, "-c", _WATCH, self.gcs, PYTHONPATH=str(ROOT))
        self._answer()

    def claims(self) -> dict[str, int]:
        """Trials that run, by sweep."""
        assert self._watch.stdin is not None
        self._watch.stdin.write("\n")
        self._watch.stdin.flush()
        found: dict[str, int] = self._answer()
        return found

    def end(self) -> None:
        for process in reversed(self._begun):
            if process.poll() is not None:
                continue
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            _, left = psutil.wait_procs(everyone, 20.0)
            for one in left:
                one.kill()

    def _answer(self) -> Any:
        assert self._watch.stdout is not None
        return json.loads(self._watch.stdout.readline())

    def _start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        process = subprocess.Popen(
            words,
            env={**own, **self.access, **environment},
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if "-c" in words else (self.folder / "head.log").open("w"),
            text=True,
        )
        self._begun.append(process)
        return process


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
