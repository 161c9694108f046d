"""Follower: brings what trials have put into the store to the driver's folder, where everything looks for it.

Signs of life, pictures and records are there a few seconds later. The records of all attempts at a trial
become one file. Each step of a metric comes from one of them: the first that the store had.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.state import Happening, SweepState
from dtr_ray.service.records import RecordWriter, parse_record, record_path, tracking_folder
from dtr_ray.storage.index import FOLDER, Index, newest, read_index, writer_of
from dtr_ray.storage.pieces import read_pieces
from dtr_ray.storage.store import Entry, Store

log = logging.getLogger(__name__)

_EVERY_S = 3.0
# Of the time, at most, for listing and reading.
_LOOK_SHARE = 0.3
_CUTS = "tracking/{}/cuts.json"


class _Merged(RecordWriter):
    """One file of what several attempts have recorded."""

    def take(self, record: dict[str, Any]) -> None:
        """Appends a record as it is, but for the steps of its metrics that are there already."""
        with self._lock:
            self._waiting.append(record)
            self._write_waiting()

    def _new_part(self, record: dict[str, Any]) -> dict[str, Any] | None:
        if "non_finite" not in record:
            return super()._new_part(record)
        step, non_finite = record["step"], {}
        for key, (value, _, _) in record["non_finite"].items():
            if step > self._last_steps.get(key, -1):
                first, count = self._non_finite.get(key, (None, step, 0))[1:]
                non_finite[key] = [value, first, count + 1]
        new = {k: v for k, v in record["values"].items() if step > self._last_steps.get(k, -1)}
        return {**record, "values": new, "non_finite": non_finite} if new or non_finite else None


class Follower:
    """A listener of the state: when a trial has ended, all that it has put is here."""

    def __init__(self, store: Store, folder: Path) -> None:
        """`folder` is the driver's."""
        self._store, self._folder = store, folder
        self._seen: dict[str, Entry] = {}
        self._again: set[str] = set()
        self._writers: dict[str, _Merged] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-follow", daemon=True)

    def start(self, state: SweepState) -> None:
        """Fetches what is there, and follows from now on."""
        state.is_cut_off = lambda: self._store.away_s > 0
        self.pull()
        self._thread.start()

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Fetches the rest of a trial that has ended."""
        if happening == "ended":
            self.pull(trial.trial_id)
            with self._lock:
                writer = self._writers.pop(trial.trial_id, None)
            if writer is not None:
                writer.close()

    def pull(self, trial_id: str | None = None) -> None:
        """Fetches what is new, of one trial or of all."""
        entries = self._store.entries(FOLDER if trial_id is None else f"{FOLDER}/{trial_id}")
        by_trial: dict[str, list[Entry]] = {}
        for entry in entries:
            by_trial.setdefault(entry.name.split("/")[1], []).append(entry)
        with self._lock:
            # The time of a change may be in whole seconds: what has just changed is looked at once more.
            changed = [t for t, e in newest(entries).items() if self._seen.get(t) != e or t in self._again]
            self._store.each(lambda trial: self._pull(trial, by_trial[trial]), changed)

    def close(self) -> None:
        """Fetches the rest and ends; a store that is closed is left as it is."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        with suppress(OSError):
            self.pull()
        for writer in self._writers.values():
            writer.close()

    def _run(self) -> None:
        wait_s = _EVERY_S
        while not self._ending.wait(wait_s):
            started = time.monotonic()
            try:
                self.pull()
            except (OSError, ValueError) as error:
                if self._ending.is_set():
                    return
                log.warning("a trial's files in the store cannot be read: %s", error)
            wait_s = max(_EVERY_S, (time.monotonic() - started) * (1 / _LOOK_SHARE - 1))

    def _pull(self, trial_id: str, entries: list[Entry]) -> None:
        last = newest(entries)[trial_id]
        with suppress(FileNotFoundError):
            index = read_index(self._store, last.name)
            folder = self._folder / "trials" / trial_id
            if self._seen.get(trial_id) == last:
                self._again.discard(trial_id)
            else:
                self._again.add(trial_id)
            for name, text in index.texts.items():
                _write(folder / name, text)
            for name, stored in index.files.items():
                path = folder / name
                if not name.startswith("checkpoints/") and not path.exists():
                    self._store.get_file(stored.key, path, stored.sha256)
            self._pull_records(trial_id, entries, index)
            self._seen[trial_id] = last

    def _pull_records(self, trial_id: str, entries: list[Entry], index: Index) -> None:
        """First the rest of the attempts before, up to where the newest was first seen; then the newest's."""
        path = tracking_folder(self._folder) / trial_id / "followed.json"
        taken = _read(path)
        before = dict(taken)
        cuts = _read(self._folder / _CUTS.format(trial_id))
        older = sorted({writer_of(entry) for entry in entries} - {index.writer})
        if not cuts.keys() >= set(older):
            for writer in older:
                if writer not in cuts:
                    there = read_index(self._store, f"{FOLDER}/{trial_id}/{writer}.json")
                    cuts[writer] = max(there.records_bytes, taken.get(writer, 0))
            # Whoever reads them on another machine reads the same.
            text = json.dumps(cuts)
            self._store.put(_CUTS.format(trial_id), text.encode())
            _write(self._folder / _CUTS.format(trial_id), text)
        for writer, end in [*((w, cuts[w]) for w in older), (index.writer, index.records_bytes)]:
            start = taken.get(writer, 0)
            if end > start:
                pieces = f"trials/{trial_id}/{writer}/records"
                lines = read_pieces(self._store, pieces, start, end).splitlines()
                self._take(trial_id, lines)
                taken[writer] = end
        if taken != before:
            _write(path, json.dumps(taken))

    def _take(self, trial_id: str, lines: Iterable[bytes]) -> None:
        if trial_id not in self._writers:
            self._writers[trial_id] = _Merged(record_path(self._folder, trial_id, "worker"))
        for line in lines:
            record = parse_record(line)
            if record is not None:
                self._writers[trial_id].take(record)


def _read(path: Path) -> dict[str, int]:
    """Bytes by writer; none where the file is absent, or torn by a crash."""
    with suppress(FileNotFoundError, ValueError):
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: int(value) for key, value in found.items()}
    return {}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
