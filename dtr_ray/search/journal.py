"""The sweep's journal: what was suggested, reported and decided, in order, on disk before it takes effect.

It is the one truth about a sweep; the Optuna study and MLflow are brought in line with it. Each line is one
JSON object with `event`, `time` (Unix time in seconds, of a clock that may be wrong), and `elapsed_s`
(seconds since its process opened the journal, of one that never jumps):

| event | the rest |
| --- | --- |
| `start`, `stop` | of a process that runs the sweep |
| `protocol` | `protocol`, `proxy` (or null): what the figures measure, the images as the driver found them |
| `trial` | `id`, `number`, `params`: suggested |
| `report` | `id`, `step`, `metrics`, `protocol`, `checkpoint`, `wall_s`, `stop`: why it is stopped, or null |
| `retry` | `id`, `reason`, `counted`: its process has died (or had to leave its machine), and it goes on |
| `end` | `id`, `status`, `reason`, `wall_s` |
| `give_up` | `reason`: too many trials have failed |
| `done` | every trial has ended, and the results are written |
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.files import is_inside, needed, parse_json
from dtr_ray.disk import sync, with_room

Status = Literal["running", "completed", "pruned", "failed"]

_NUMBER = (int, float)
_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "protocol": {"protocol": dict},
    "trial": {"id": str, "number": int, "params": dict},
    "report": {"id": str, "step": int, "metrics": dict, "checkpoint": str, "wall_s": _NUMBER,
               "stop": (str, type(None))},
    "retry": {"id": str, "reason": str, "counted": bool},
    "end": {"id": str, "status": str, "reason": str},
}  # fmt: skip
"""What an event must have beside `event` and `time`."""

_protocols: dict[str, dict[str, Any]] = {}


@dataclass
class TrialRecord:
    """One trial of a sweep, as far as the journal knows it."""

    trial_id: str
    number: int
    params: dict[str, Any]
    status: Status = "running"
    reason: str = ""
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    """Every reported metric, by training step."""
    checkpoints: dict[int, str] = field(default_factory=dict)
    """Checkpoint folders relative to the trial's, by training step."""
    protocols: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the figures of each training step measure; empty in journals from before that was kept."""
    wall_s: float = 0.0
    """Seconds that it held its resources, as far as its reports and its end tell."""
    retries: int = 0
    """Times that its process died or hung, and another went on from its checkpoint."""
    moves: int = 0
    """Times that it left a machine that was to go; these do not count as retries."""
    retry_reason: str = ""
    """Of the last retry or move."""

    @property
    def train_seconds(self) -> float:
        """Seconds spent in training steps, up to the newest report."""
        return max((values.get("train_seconds", 0.0) for values in self.reports.values()), default=0.0)

    @property
    def last_step(self) -> int:
        """Training step of the newest report, 0 before the first."""
        return max(self.reports, default=0)

    def best(self, metric: str) -> tuple[int, float] | None:
        """(step, value) of the smallest value reported by the trained model, or None."""
        found = [(values[metric], step) for step, values in self.reports.items() if step and metric in values]
        if not found:
            return None
        value, step = min(found)
        return step, value


class Journal:
    """An append-only file; every event is on disk when `write` returns, which waits while that is full."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; a last line torn by a crash is cut off, since it never took effect."""
        self._folder, self._opened = path.parent, time.monotonic()
        self.events, self._end = _read(path)
        """What was there when it was opened."""
        self._file = with_room(
            self._folder, lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        )
        os.ftruncate(self._file, self._end)
        with_room(self._folder, lambda: sync(self._folder))
        self.after_write: Callable[[], None] | None = None
        """Called with every event on the disk, before it takes effect."""

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Appends an event and waits for the disk."""
        elapsed_s = round(time.monotonic() - self._opened, 3)
        line = {"event": event, "time": round(time.time(), 3), "elapsed_s": elapsed_s, **values}
        text = json.dumps(line).encode() + b"\n"
        with_room(self._folder, lambda: self._append(text))
        self._end += len(text)
        if self.after_write is not None:
            self.after_write()
        return line

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _append(self, text: bytes) -> None:
        """What a disk that fills up has taken of the line is written over by the next try."""
        done = 0
        while done < len(text):
            done += os.pwrite(self._file, text[done:], self._end + done)
        os.fsync(self._file)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a journal; none where there is no file."""
    return _read(path)[0]


def replay(events: list[dict[str, Any]]) -> dict[str, TrialRecord]:
    """The trials that the events add up to, by id, in the order in which they were suggested."""
    trials: dict[str, TrialRecord] = {}
    for event in events:
        apply(trials, event)
    return trials


def apply(trials: dict[str, TrialRecord], event: dict[str, Any]) -> None:
    """Brings `trials` up to date with one more event."""
    kind = event["event"]
    if kind == "trial":
        trials[event["id"]] = TrialRecord(event["id"], event["number"], event["params"])
    elif kind == "report":
        trial = trials[event["id"]]
        trial.reports[event["step"]] = event["metrics"]
        trial.checkpoints[event["step"]] = event["checkpoint"]
        trial.protocols[event["step"]] = _one(event.get("protocol", {}))
        trial.wall_s = event["wall_s"]
        if event["stop"]:
            trial.status, trial.reason = "pruned", event["stop"]
    elif kind == "retry":
        trial = trials[event["id"]]
        trial.retries, trial.moves = trial.retries + event["counted"], trial.moves + (not event["counted"])
        trial.retry_reason = event["reason"]
    elif kind == "end":
        trial = trials[event["id"]]
        trial.status, trial.reason = event["status"], event["reason"]
        trial.wall_s = max(trial.wall_s, event.get("wall_s", 0.0))


def is_done(events: list[dict[str, Any]]) -> bool:
    """Whether the sweep was complete, with all results written."""
    own = [event["event"] for event in events if event["event"] not in ("start", "stop", "protocol")]
    return own[-1:] == ["done"]


def failed_before_giving_up(events: list[dict[str, Any]]) -> set[str]:
    """Trials that had failed when the sweep last gave up: a resumed one does not give up for them again."""
    gave_up = max((n for n, event in enumerate(events) if event["event"] == "give_up"), default=0)
    return {e["id"] for e in events[:gave_up] if e["event"] == "end" and e["status"] == "failed"}


def seconds_spent(events: list[dict[str, Any]]) -> float:
    """Seconds between the starts of the sweep and the last event that followed each.

    A clock that was set back or forth meanwhile changes nothing, unless the journal is too old to have
    `elapsed_s`.
    """
    total = 0.0
    start: dict[str, Any] | None = None
    last: dict[str, Any] = {}
    for event in events:
        is_start = event["event"] == "start"
        # Another process may have something to note before it starts.
        if is_start or event.get("elapsed_s", 0.0) < last.get("elapsed_s", 0.0):
            total += _between(start, last)
            start = event if is_start else None
        last = event
    return total + _between(start, last)


def _between(start: dict[str, Any] | None, last: dict[str, Any]) -> float:
    """Seconds from a process's start to its last event."""
    if start is None:
        return 0.0
    clock = "elapsed_s" if "elapsed_s" in start and "elapsed_s" in last else "time"
    return float(max(0.0, last[clock] - start[clock]))


def _one(protocol: dict[str, Any]) -> dict[str, Any]:
    """The protocol as one object for all that are equal: every report has one, and a sweep few different."""
    return _protocols.setdefault(json.dumps(protocol), protocol)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole events, and how many bytes they take; raises ConfigError naming file and line."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    whole = content.rfind(b"\n") + 1
    events: list[dict[str, Any]] = []
    trials: set[str] = set()
    lines = content[:whole].split(b"\n")[:-1]
    if lines and b"\0" in lines[-1]:
        # The power failed when the file had grown, and its last page had not arrived.
        whole -= len(lines.pop()) + 1
    for number, line in enumerate(lines, 1):
        event = _checked(line, f"{path}:{number}", trials)
        if event["event"] == "trial":
            trials.add(event["id"])
        events.append(event)
    return events, whole


def _checked(line: bytes, where: str, trials: set[str]) -> dict[str, Any]:
    """An event that `apply` can take, after those of these trials."""
    event = parse_json(line, where, dict)
    needed(event, {"event": str, "time": _NUMBER}, where)
    if "elapsed_s" in event:
        needed(event, {"elapsed_s": _NUMBER}, where)
    kind = event["event"]
    needed(event, _KEYS.get(kind, {}), where)
    wrong = None
    if kind in ("report", "retry", "end") and event["id"] not in trials:
        wrong = f"it tells of {event['id']!r:.80}, a trial that was not suggested before"
    elif kind == "trial" and (not is_inside(event["id"]) or "/" in event["id"]):
        wrong = f"its trial's id is {event['id']!r:.80}"
    elif kind == "report" and event["checkpoint"] and not is_inside(event["checkpoint"]):
        wrong = f"its checkpoint {event['checkpoint']!r:.80} leads out of the trial's folder"
    elif kind == "end" and event["status"] not in get_args(Status):
        wrong = f"its status is {event['status']!r:.80}"
    if wrong is not None:
        raise ConfigError(f"{where} is damaged: {wrong}")
    return event
