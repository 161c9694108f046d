"""RecordWriter: what is to be logged, appended to files on disk before anything sends it anywhere.

A sweep's records lie in `<sweep folder>/tracking/<run key>/<writer>.jsonl`. The run key is `sweep` for
the sweep's own run and the trial's id for a trial's. A run may have several files (the driver's, the
worker's); each has one writing process. A line is one record: a JSON object with `kind`, `time_ms` (Unix
time in milliseconds, fixed when written, never less than that of the line before) and

| kind | the rest |
| --- | --- |
| `start` | `name`, `tags`, `params`, `parent` (a run key or null); a second one reopens the run |
| `metrics` | `step`, `values`, and `non_finite` where there are such: {key: [value, first step, count]} |
| `tags`, `params` | `values` |
| `artifact` | `path` (a file or folder, relative to the sweep's), `artifact_path` (folder in the run) |
| `end` | `status`: FINISHED, KILLED or FAILED |
"""

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dtr_ray.disk import is_full, make_folder, sync

log = logging.getLogger(__name__)
END_STATUSES = ("FINISHED", "KILLED", "FAILED")

_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"name": str, "tags": dict, "params": dict, "parent": (str, type(None))},
    "metrics": {"step": int, "values": dict},
    "tags": {"values": dict},
    "params": {"values": dict},
    "artifact": {"path": str, "artifact_path": str},
    "end": {"status": str},
}
_SYNCED, _MAX_STEP = ("start", "end", "artifact"), 2**63


def tracking_folder(sweep_folder: Path) -> Path:
    """Where a sweep keeps its records."""
    return sweep_folder / "tracking"


def record_path(sweep_folder: Path, run_key: str, writer: str) -> Path:
    """The file that one writer (`driver`, `worker`) appends a run's records to."""
    return tracking_folder(sweep_folder) / run_key / f"{writer}.jsonl"


class RecordWriter:
    """Appends a run's records to one file, of which it is the only writer.

    Metrics are monotone: a value at or before the last step written for its key is dropped, so that a
    resumed training, which repeats some steps with the same outcome, leaves each step once. NaN and
    infinities are no metrics (SQL stores hold an infinity as 1.8e308, which ruins a plot): they are
    counted, and the count is shown as a tag.

    A disk that is full or away never stops the caller: records wait in memory, at most `max_waiting`
    (then the oldest are dropped), and are written by a later call. This is logged once.
    """

    def __init__(self, path: Path, max_waiting: int = 10_000) -> None:
        self.path = Path(path)
        self._waiting: deque[dict[str, Any]] = deque()
        self._max_waiting = max_waiting
        self._num_dropped = 0
        self._file: int | None = None
        self._cut_at: int | None = None
        self._last_ms = 0
        self._last_steps: dict[str, int] = {}
        self._non_finite: dict[str, list[Any]] = {}
        self._error: OSError | None = None
        self._lock = threading.Lock()
        self._write_waiting()

    @property
    def num_waiting(self) -> int:
        """Records that are in memory only, for want of a disk that takes them."""
        return len(self._waiting)

    def start(
        self, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], parent: str | None = None
    ) -> None:
        """The run starts, or goes on after an end. `parent` is the run key of the run that it belongs to."""
        self._add("start", name=name, tags=_texts(tags), params=_texts(params), parent=parent)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name at a training step in [0, 2**63); raises ValueError for another step."""
        step = int(step)
        if not 0 <= step < _MAX_STEP:
            raise ValueError(f"a metric's step is at least 0 and below 2**63, not {step}")
        self._add("metrics", step=step, values={key: float(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags; a later value replaces an earlier one."""
        self._add("tags", values=_texts(values))

    def params(self, values: Mapping[str, Any]) -> None:
        """Sets parameters, which MLflow never changes afterwards."""
        self._add("params", values=_texts(values))

    def artifact(self, path: str, artifact_path: str = "") -> None:
        """A file or folder to be kept with the run; it must exist, and stay as it is until it is sent.

        Args:
            path: relative to the sweep's folder; ValueError if it is absolute.
            artifact_path: folder in the run's artifacts, empty for the top.
        """
        if Path(path).is_absolute():
            raise ValueError(f"an artifact's path is relative to the sweep's folder, not {path!r}")
        self._add("artifact", path=path, artifact_path=artifact_path)

    def end(self, status: str) -> None:
        """The run has ended: FINISHED, KILLED (stopped early) or FAILED; ValueError for another word."""
        if status not in END_STATUSES:
            raise ValueError(f"a run's status is one of {', '.join(END_STATUSES)}, not {status!r}")
        self._add("end", status=status)

    def settle(self) -> None:
        """All records so far are on the disk when this returns; raises OSError where it is full."""
        with self._lock:
            self._write_waiting()
            if self._waiting and self._error is not None and is_full(self._error):
                raise self._error
            if self._file is not None:
                self._sync(raising=True)

    def close(self) -> None:
        """Tries once more to write what waits, and closes the file; a later record opens it again."""
        with self._lock:
            self._write_waiting()
            if self._file is not None:
                os.close(self._file)
                self._file = None
            if self._waiting:
                log.error("%s could not take %d records: they are lost", self.path, len(self._waiting))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, kind: str, **rest: Any) -> None:
        with self._lock:
            # A clock that is set back must not end a run before its start.
            self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
            self._waiting.append({"kind": kind, "time_ms": self._last_ms, **rest})
            self._write_waiting()
            while len(self._waiting) > self._max_waiting:
                self._waiting.popleft()
                self._num_dropped += 1

    def _write_waiting(self) -> None:
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                record = self._new_part(self._waiting[0])
                if record is not None:
                    self._append(record)
                self._waiting.popleft()
        except OSError as error:
            if self._error is None:
                log.warning("%s cannot be written (%s): records wait in memory", self.path, error)
            self._error = error
        else:
            if self._error is not None:
                log.warning("%s can be written again; %d records were dropped", self.path, self._num_dropped)
            self._error, self._num_dropped = None, 0

    def _open(self) -> None:
        """Opens the file, cuts off a line torn by a crash, and learns which steps it holds."""
        make_folder(self.path.parent)
        lines = read_lines(self.path, 0)
        for line in lines:
            if line.record is not None:
                self._last_ms = max(self._last_ms, line.record["time_ms"])
                if line.record["kind"] == "metrics":
                    self._note(line.record)
        self._cut_at = lines[-1].end if lines else 0
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        sync(self.path.parent)
        self._cut()

    def _cut(self) -> None:
        assert self._file is not None
        if self._cut_at is not None:
            if os.fstat(self._file).st_size > self._cut_at:
                os.ftruncate(self._file, self._cut_at)
            self._cut_at = None

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._cut()
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        # Until the line is whole, what there is of it would spoil the next one.
        self._cut_at = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written < len(line):
            # A second try says why: it raises where the disk is full.
            written += os.write(self._file, line[written:])
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes were taken")
        self._cut_at = None
        if record["kind"] == "metrics":
            self._note(record)
        if record["kind"] in _SYNCED:
            self._sync()

    def _sync(self, *, raising: bool = False) -> None:
        assert self._file is not None
        try:
            os.fsync(self._file)
        except OSError as error:
            if raising and is_full(error):
                raise
            # The line is with the operating system all the same: to write it again would double it.
            log.warning("%s cannot be synced to the disk: %s", self.path, error)

    def _new_part(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The record without metrics that the file has already; None if nothing is left."""
        if record["kind"] != "metrics":
            return record
        step = record["step"]
        new = {k: v for k, v in record["values"].items() if step > self._last_steps.get(k, -1)}
        if not new:
            return None
        non_finite = {}
        for key in [k for k, v in new.items() if not math.isfinite(v)]:
            first, count = self._non_finite.get(key, (None, step, 0))[1:]
            non_finite[key] = [str(new.pop(key)), first, count + 1]
        part = {**record, "values": new}
        return {**part, "non_finite": non_finite} if non_finite else part

    def _note(self, record: dict[str, Any]) -> None:
        non_finite = record.get("non_finite", {})
        self._non_finite.update(non_finite)
        for key in (*record["values"], *non_finite):
            self._last_steps[key] = max(record["step"], self._last_steps.get(key, -1))


@dataclass(frozen=True)
class Line:
    """A whole line of a record file."""

    record: dict[str, Any] | None
    """None if the line is no record, as a machine's crash can leave it."""
    text: bytes
    end: int
    """Offset in bytes of the next line."""


def read_lines(path: Path, offset: int, max_bytes: int | None = None) -> list[Line]:
    """The whole lines from a byte offset on; a last line without its end is left for later.

    Args:
        path: a record file; one that does not exist has no lines.
        offset: bytes to pass over; more than the file has gives no lines.
        max_bytes: stop after the first line beyond so many bytes.
    """
    lines: list[Line] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return lines
    with file:
        file.seek(offset)
        start = offset
        for text in file:
            if not text.endswith(b"\n"):
                break
            offset += len(text)
            lines.append(Line(parse_record(text), text, offset))
            if max_bytes is not None and offset - start >= max_bytes:
                break
    return lines


def parse_record(text: bytes) -> dict[str, Any] | None:
    """A line's record, or None."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("kind") not in _FIELDS:
        return None
    fields = {"time_ms": int, **_FIELDS[record["kind"]]}
    return record if all(isinstance(record.get(k, ...), t) for k, t in fields.items()) else None


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}
