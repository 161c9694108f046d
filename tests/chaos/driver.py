"""The sweep's own process, as typed on the head."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from cluster.machines import Machine
from tiny_sweeps import wait_until


class Driver:
    """`python -m dtr_ray.sweep` on the head, in a session of its own."""

    def __init__(self, machine: Machine, words: str, log: Path, settings: str) -> None:
        self._log = log
        line = f"exec env {settings} python -m dtr_ray.sweep {words}"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                machine.command(line),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        """Of the sweep itself, as this host counts; `process` is what has entered the machine for it."""
        self.pid = int(wait_until(lambda: children.read_text().split(), 10, f"a sweep starts, see {log}")[0])

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.process.poll()

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the driver has not ended in {seconds:g} s:\n{self.output[-3000:]}"
            ) from None

    def kill(self) -> None:
        for pid in (self.pid, self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()
