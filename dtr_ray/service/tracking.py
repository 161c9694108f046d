"""Tracker: ships a sweep's record files to MLflow from one thread, in order and once.

The thread reads what `RecordWriter`s have appended, sends it, and then notes on disk how far it came. A
crash in between means that some records are sent again, which changes nothing (see `mlflow_store`). While
the server is away the records wait in their files; training never notices.
"""

import heapq
import json
import logging
import os
import re
import shlex
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtr_ray.search.database import without_password
from dtr_ray.service.mlflow_client import sqlite_path
from dtr_ray.service.mlflow_store import SWEEP_RUN, Entry, MlflowStore, RefusedError, entries_of
from dtr_ray.service.positions import Positions
from dtr_ray.service.records import Line, read_lines, tracking_folder

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 1.0
_READ_BYTES = 500_000
_MAX_ENTRIES = 1000
# Of the time, at most, for looking at thousands of files that have not grown.
_LOOK_SHARE = 0.05
_EVENTS = ("start", "artifact", "end")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")


class Tracker:
    """The one shipper of a sweep, in its driver's process.

    Args:
        sweep_folder: the sweep's folder; records lie in its `tracking`.
        tracking_uri: MLflow's: a SQLite file (`sqlite:///...`) or a server.
        experiment: name of the MLflow experiment, made if absent.
        sweep_id: tells this sweep's runs from all others; letters, digits and `._-`, else ValueError.
        artifact_location: URI for a new experiment's artifacts; default: `default_artifact_location`.
        poll_s: seconds between two looks at the files.
        max_backoff_s: longest wait between two tries while the server is away; the first is 1 s.
    """

    def __init__(
        self,
        sweep_folder: Path,
        tracking_uri: str,
        experiment: str,
        sweep_id: str,
        artifact_location: str | None = None,
        *,
        poll_s: float = 2.0,
        max_backoff_s: float = 60.0,
    ) -> None:
        if not _PLAIN.fullmatch(sweep_id):
            raise ValueError(f"sweep_id has only letters, digits and ._-, not {sweep_id!r}")
        self._sweep_folder = Path(sweep_folder)
        self._folder = tracking_folder(self._sweep_folder)
        self._shown_uri = without_password(tracking_uri)
        location = artifact_location or default_artifact_location(tracking_uri, experiment)
        self._store = MlflowStore(tracking_uri, experiment, sweep_id, location)
        self._positions = Positions(self._folder / "state.json", f"{tracking_uri} {experiment} {sweep_id}")
        self._store.run_ids.update(self._positions.run_ids)
        self._poll_s, self._max_backoff_s = poll_s, max_backoff_s
        self._backoff_s = self._look_s = 0.0
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._deadline = 0.0

    def start(self) -> None:
        """Starts the thread, which imports MLflow; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> int:
        """Sends what waits for at most `timeout_s` seconds, and stops; returns the records still waiting."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.pending()

    def pending(self) -> int:
        """Records on disk that MLflow has not taken yet."""
        return sum(len(read_lines(path, self._positions.offset(name))) for name, path in self._longer_files())

    def run_id(self, run_key: str) -> str | None:
        """MLflow's id of a run; None before it was made there."""
        return self._store.run_ids.get(run_key)

    def _longer_files(self) -> list[tuple[str, Path]]:
        """Record files that hold more than was sent, by their name in the folder; the sweep's own first."""
        found = []
        # There may be tens of thousands: pathlib would take several times as long.
        with suppress(FileNotFoundError), os.scandir(self._folder) as runs:
            for run in runs:
                if run.is_dir():
                    with os.scandir(run.path) as files:
                        ours = [file for file in files if file.name.endswith(".jsonl")]
                    sizes = {f"{run.name}/{file.name}": file.stat().st_size for file in ours}
                    found += [name for name, size in sizes.items() if size > self._positions.offset(name)]
        found.sort(key=lambda name: (not name.startswith(f"{SWEEP_RUN}/"), name))
        return [(name, self._folder / name) for name in found]

    def _run(self) -> None:
        while True:
            more = self._try_ship()
            if self._closing.is_set():
                left_s = self._deadline - time.monotonic()
                if left_s <= 0 or not (more or self._backoff_s or self.pending()):
                    return
                time.sleep(min(self._backoff_s, _FIRST_BACKOFF_S, left_s))
            elif not more:
                self._closing.wait(self._backoff_s or max(self._poll_s, self._look_s / _LOOK_SHARE))

    def _try_ship(self) -> bool:
        """Sends what there is; troubles of any kind are logged once, and tried again later."""
        try:
            more = self._ship()
        except Exception as error:  # The server's, the network's, the disk's: none may reach the sweep.
            if self._store.has_lost_runs:
                self._begin_anew()
            elif not self._backoff_s:
                reason = _short(str(error))
                log.warning(
                    "MLflow at %s takes no records now, they wait on disk: %s", self._shown_uri, reason
                )
            self._backoff_s = min(max(2 * self._backoff_s, _FIRST_BACKOFF_S), self._max_backoff_s)
            self._store.reset()
            return False
        if self._backoff_s:
            log.warning("MLflow at %s takes records again", self._shown_uri)
            self._backoff_s = 0.0
        return more

    def _begin_anew(self) -> None:
        """Sends everything again, to a server that has lost it: what it has nevertheless stays as it is."""
        log.warning(
            "MLflow at %s has lost runs of this sweep: all its records are sent again", self._shown_uri
        )
        self._positions.forget()
        self._store.has_lost_runs = False

    def _ship(self) -> bool:
        """Sends a portion of every run's new records; returns whether more was left."""
        self._store.connect()
        runs: dict[str, list[tuple[str, Path]]] = {}
        started = time.thread_time()
        longer = self._longer_files()
        self._look_s = time.thread_time() - started
        for name, path in longer:
            runs.setdefault(path.parent.name, []).append((name, path))
        more = False
        for run_key, files in runs.items():
            if self._closing.is_set() and time.monotonic() > self._deadline:
                return True
            more |= self._ship_run(run_key, files)
        return more

    def _ship_run(self, run_key: str, files: list[tuple[str, Path]]) -> bool:
        streams: list[list[tuple[str, Line]]] = []
        more = False
        for name, path in files:
            offset = self._positions.offset(name)
            lines = read_lines(path, offset, _READ_BYTES)
            if lines:
                _sync(path)
                more |= lines[-1].end - offset >= _READ_BYTES
                streams.append([(name, line) for line in lines])
        portion = _Portion()
        for name, line in heapq.merge(*streams, key=lambda item: _place(item[1])):
            if line.record is None:
                self._set_aside(run_key, [line.text.decode(errors="replace")], "the line is no record")
            elif line.record["kind"] in _EVENTS:
                self._send(run_key, portion)
                self._send_event(run_key, line.record)
            portion.offsets[name] = line.end
            portion.entries += [] if line.record is None else entries_of(line.record)
            # An artifact is noted at once, so that what follows it never makes it travel again.
            if len(portion.entries) >= _MAX_ENTRIES or not portion.entries:
                self._send(run_key, portion)
        self._send(run_key, portion)
        return more

    def _send(self, run_key: str, portion: "_Portion") -> None:
        """Sends the entries, then notes how far that was, and empties the portion."""
        if portion.entries:
            refused = self._store.log(run_key, portion.entries)
            if refused:
                self._set_aside(run_key, [asdict(entry) for entry, _ in refused], refused[0][1])
        if portion.offsets:
            self._store.harden()
            self._positions.save(portion.offsets, self._store.run_ids)
            self._store.settled(run_key)
        portion.entries, portion.offsets = [], {}

    def _send_event(self, run_key: str, record: dict[str, Any]) -> None:
        """Starts or ends the run, or sends an artifact."""
        try:
            match record["kind"]:
                case "start":
                    self._store.start(run_key, record)
                case "artifact":
                    path = self._sweep_folder / record["path"]
                    self._store.artifact(run_key, path, record["artifact_path"])
                case "end":
                    self._store.end(run_key, record["status"], record["time_ms"])
        except RefusedError as error:
            self._set_aside(run_key, [record], str(error))

    def _set_aside(self, run_key: str, refused: list[Any], reason: str) -> None:
        """Keeps what MLflow will never take, so that it does not hold up what comes after it."""
        path, reason = self._folder / "rejected.jsonl", without_password(reason)
        with path.open("a", encoding="utf-8") as file:
            for item in refused:
                file.write(json.dumps({"run": run_key, "refused": item, "reason": reason}) + "\n")
        log.warning(
            "MLflow refused %d records of run %s, kept in %s: %s", len(refused), run_key, path, _short(reason)
        )


@dataclass
class _Portion:
    """Entries of a run to be sent together, and where in the files that leads to."""

    entries: list[Entry] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)


def send_waiting(
    sweep_folder: Path,
    tracking_uri: str,
    experiment: str,
    sweep_id: str,
    artifact_location: str | None = None,
    *,
    timeout_s: float = 60.0,
) -> int:
    """Sends what an earlier sweep left on disk; returns how many records still wait after `timeout_s`."""
    tracker = Tracker(sweep_folder, tracking_uri, experiment, sweep_id, artifact_location)
    tracker.start()
    return tracker.close(timeout_s)


def default_tracking_uri(output_dir: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file in the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(output_dir).resolve() / 'mlflow.db'}"


def default_artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """Beside a SQLite file, in `mlartifacts`; None for a server, which decides itself."""
    path = sqlite_path(tracking_uri)
    return None if path is None else (path.resolve().parent / "mlartifacts" / experiment).as_uri()


def ui_command(tracking_uri: str) -> str:
    """What to type to see the runs: a command, or for a server its address."""
    shown = without_password(tracking_uri)
    if shown.startswith(("http://", "https://")):
        return shown
    return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


def _place(line: Line) -> int:
    """Time of a line; a file's first line goes first if it starts the run: nodes' clocks differ."""
    if line.record is None or (line.record["kind"] == "start" and line.end == len(line.text)):
        return 0
    return int(line.record["time_ms"])


def _short(text: str) -> str:
    return " ".join(without_password(text).split())[:300]


def _sync(path: Path) -> None:
    """What MLflow has seen, a crash of the machine must not take from the file it came from."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
