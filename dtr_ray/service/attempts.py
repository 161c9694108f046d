"""Attempts: what a trial's main worker tells of itself through two small files in the trial's folder.

`progress.json` is its newest sign of life, for the display and the watchdog. `attempts.jsonl` has a line for
every process that has worked on the trial, brought up to date at every step: what was trained when, and what
was trained again after a crash.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PROGRESS_INTERVAL_S = 0.5
# Room for the figures to grow, since a line is written over in place.
_LINE_BYTES = 256


@dataclass
class Attempt:
    """One process's work on a trial."""

    attempt: int
    """1 for the first process."""
    host: str
    pid: int
    started: float
    """Unix time in seconds at which the process turned to the trial."""
    from_step: int | None = None
    """Training step that it went on from; None before its first own step."""
    to_step: int | None = None
    """Training step that it has reached."""
    first_step_s: float | None = None
    """Seconds from `started` to the end of its first training step."""
    last_s: float = 0.0
    """Seconds from `started` to its last sign of life."""

    @property
    def num_steps(self) -> int:
        """Training steps that it has made."""
        return 0 if self.from_step is None or self.to_step is None else self.to_step - self.from_step


class AttemptLog:
    """Writes both files for one process, which is the only one in the trial's folder."""

    def __init__(self, trial_folder: Path) -> None:
        self._progress = trial_folder / "progress.json"
        path = trial_folder / "attempts.jsonl"
        count = len(read_attempts(trial_folder))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._offset = count * _LINE_BYTES
        self._attempt = Attempt(count + 1, platform.node()[:60], os.getpid(), round(time.time(), 3))
        self._started = time.monotonic()
        self._told = -_PROGRESS_INTERVAL_S
        self._write()
        self.tell(0, "loading")

    @property
    def number(self) -> int:
        """1 for the trial's first process."""
        return self._attempt.attempt

    def tell(self, step: int, phase: str) -> None:
        """The process is alive: `phase` is "training" right after a training step."""
        now = time.monotonic()
        attempt = self._attempt
        attempt.last_s = round(now - self._started, 3)
        if phase == "training":
            if attempt.from_step is None:
                attempt.from_step, attempt.first_step_s = step - 1, attempt.last_s
            attempt.to_step = step
        self._write()
        if now - self._told >= _PROGRESS_INTERVAL_S:
            self._told = now
            temporary = self._progress.with_suffix(".tmp")
            beat = {"step": step, "phase": phase, "time": time.time()}
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(self._progress)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self) -> None:
        """A few microseconds; what the kernel has, a kill of this process does not take."""
        line = json.dumps(asdict(self._attempt)).encode().ljust(_LINE_BYTES - 1) + b"\n"
        os.pwrite(self._file, line, self._offset)


def read_attempts(trial_folder: Path) -> list[Attempt]:
    """Every process's work on the trial, in order."""
    try:
        content = (trial_folder / "attempts.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    return [Attempt(**json.loads(line)) for line in whole.splitlines()]


def read_heartbeat(trial_folder: Path) -> dict[str, Any]:
    """The trial's newest sign of life: `step`, `phase`, `time` (Unix, s); empty before the first."""
    try:
        found: dict[str, Any] = json.loads((trial_folder / "progress.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
