"""Attempts: what a trial's main worker tells of itself through two small files in the trial's folder.

`progress.json` is its newest sign of life, for the display and the watchdog, with the longest time that it
took to the next one so far. `attempts.jsonl` has a line for every process that has worked on the trial,
brought up to date at every step: what was trained when, and what was trained again after a crash.

Phases are `loading` (to the end of the first step), `training`, `checkpointing`, `evaluating`, and `waiting`
for what the sweep says to a report. Durations are of a clock that never jumps.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtr_ray.disk import is_full, with_room, write_whole

_PROGRESS_INTERVAL_S = 0.5
# Room for the figures to grow, since a line is written over in place.
_LINE_BYTES = 256
_PROGRESS_BYTES = 2048


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
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._file = with_room(trial_folder, lambda: os.open(path, flags, 0o644))
        count = -(-os.fstat(self._file).st_size // _LINE_BYTES)
        self._offset = count * _LINE_BYTES
        self._attempt = Attempt(count + 1, platform.node()[:60], os.getpid(), round(time.time(), 3))
        self._started = self._last = time.monotonic()
        self._written = -_PROGRESS_INTERVAL_S
        self._count = 0
        self._phase = "loading"
        self._longest: dict[str, float] = {}
        self._longest_of_phase = 0.0
        """Of the phase that goes on: evaluating ends with a part that takes longer than those before."""
        with_room(trial_folder, lambda: self.tell(0, "loading"))

    @property
    def number(self) -> int:
        """1 for the trial's first process."""
        return self._attempt.attempt

    def made(self, step: int) -> None:
        """A training step has just been made."""
        attempt = self._attempt
        if attempt.from_step is None:
            attempt.from_step = step - 1
            attempt.first_step_s = round(time.monotonic() - self._started, 3)
        attempt.to_step = step
        self.tell(step, "training")

    def tell(self, step: int, phase: str) -> None:
        """The process is alive, and is now in this phase."""
        now = time.monotonic()
        self._attempt.last_s = round(now - self._started, 3)
        self._write()
        self._longest_of_phase = max(self._longest_of_phase, now - self._last)
        changed = phase != self._phase
        if changed or phase == "training":
            self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), self._longest_of_phase)
            self._longest_of_phase = 0.0
        self._phase, self._last, self._count = phase, now, self._count + 1
        if changed or now - self._written >= _PROGRESS_INTERVAL_S:
            self._written = now
            self._write_progress(step)

    def sync(self) -> None:
        """Has the steps so far on the disk, before a checkpoint that holds them."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write_progress(self, step: int) -> None:
        beat = {
            "step": step,
            "phase": self._phase,
            "time": time.time(),
            "attempt": self.number,
            "count": self._count,
            "host": self._attempt.host,
            "longest_s": {phase: round(seconds, 3) for phase, seconds in self._longest.items()},
        }
        text = json.dumps(beat).encode()
        try:
            write_whole(self._progress, text)
        except OSError as error:
            if not is_full(error):
                raise
            # In the place of the one before, which takes no room.
            with self._progress.open("r+b") as file:
                file.write(text.ljust(_PROGRESS_BYTES))

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
    found = []
    for start in range(0, len(content), _LINE_BYTES):
        line = content[start : start + _LINE_BYTES]
        # A line that did not arrive before the power failed is one that is not there.
        if line.endswith(b"\n") and b"\0" not in line:
            found.append(Attempt(**json.loads(line)))
    return found


def read_heartbeat(trial_folder: Path) -> dict[str, Any]:
    """The trial's newest sign of life; empty before the first.

    `step`, `phase`; `attempt` and `count`, which together grow with every sign; `host`; `longest_s`, the
    longest time in seconds to the next sign in each phase so far; `time` (Unix, s), of the host's clock.
    """
    try:
        found: dict[str, Any] = json.loads((trial_folder / "progress.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # One that is written over in its place may be read in the midst of that.
        return {}
    return found
