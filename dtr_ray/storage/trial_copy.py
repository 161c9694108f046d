"""TrialCopy: what a worker keeps in the store of the trial that it trains.

Everything goes up from a thread beside training. Training waits for it twice: before a checkpoint is written
the one before it is in the store, and before a report is made all that it tells of.
"""

import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.files import read_json
from dtr_ray.storage.checkpoints import fetch_checkpoint, sha256_of
from dtr_ray.storage.index import Index, Stored, index_name, newest, read_newest, writer_of
from dtr_ray.storage.lease import newest_epoch
from dtr_ray.storage.pieces import PieceWriter
from dtr_ray.storage.store import Store

log = logging.getLogger(__name__)

_TEXTS = ("reports.jsonl", "best.json", "attempts.jsonl", "progress.json")
_TAKEN_OVER = ("reports.jsonl", "best.json", "attempts.jsonl")
_SIGNS = ("attempts.jsonl", "progress.json")
_MANIFEST = "manifest.json"
_EVERY_S = 5.0
_CLOSE_TIMEOUT_S = 60.0
# Without a new checkpoint it is seen only so often whether another process has taken over.
_ROUNDS_UNSEEN = 6


class SupersededError(RuntimeError):
    """Another process trains this trial now: what this one does would be lost."""


class TrialCopy:
    """One attempt at a trial, its folder on this machine and its files in the store."""

    def __init__(self, store: Store, trial_id: str, epoch: int, folder: Path, records: Path) -> None:
        """Takes the trial over from the attempts before; nothing is fetched yet.

        Args:
            store: the sweep's.
            trial_id: the trial's.
            epoch: of the driver that has started this attempt.
            folder: the trial's, on this machine; `fetch` makes it what the store has.
            records: the file of this attempt's MLflow records.

        Raises SupersededError where another driver has taken the sweep over.
        """
        self._store, self._trial_id, self._epoch = store, trial_id, epoch
        self._folder = folder
        if newest_epoch(store) > epoch:
            raise SupersededError(f"{trial_id}: another process runs the sweep now")
        before = read_newest(store, trial_id)
        attempt = before.attempt + 1
        writer = f"{epoch:06d}-{attempt:06d}-{secrets.token_hex(4)}"
        self._index = replace(before, writer=writer, attempt=attempt, records_bytes=0)
        self._index.texts.pop("progress.json", None)
        records.unlink(missing_ok=True)
        self._records = PieceWriter(store, f"trials/{trial_id}/{writer}/records", records)
        self._known: dict[str, tuple[int, int]] = {}
        self._rounds_unseen = 0
        self._asked = self._done = 0
        self._wake, self._changed = threading.Event(), threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self.alive: Callable[[], object] = lambda: None
        """Called every few seconds while training waits."""
        self._index_lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"store-{trial_id}", daemon=True)
        self._put_index()

    def fetch(self) -> None:
        """Makes the folder what the store has: reports, and the newest whole checkpoint."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if path.is_dir() and path.name != "checkpoints":
                shutil.rmtree(path)
            elif path.is_file() and path.name != ".lock":
                path.unlink()
        for name in _TAKEN_OVER:
            if name in self._index.texts:
                (self._folder / name).write_text(self._index.texts[name], encoding="utf-8")
        wanted = self._index.checkpoints()
        for path in (self._folder / "checkpoints").glob("*"):
            if path.is_dir() and not (path.name.isdecimal() and int(path.name) in wanted):
                shutil.rmtree(path)
        for step, files in reversed(wanted.items()):
            damage = fetch_checkpoint(self._store, files, self._folder)
            if damage is None:
                break
            text = (
                "%s: the checkpoint of step %d in the store is damaged (%s): going back to the one before it"
            )
            log.warning(text, self._trial_id, step, damage)
            keys = [self._index.files.pop(name).key for name in files]
            self._put_index()
            self._store.delete(keys)

    def newest_checkpoint(self) -> dict[str, Stored]:
        """Its files, for workers on other machines; empty where there is none."""
        return next(reversed(self._index.checkpoints().values()), {})

    def start(self) -> None:
        """Begins to keep the store up to date."""
        self._thread.start()
        threading.Thread(target=self._beat, name=f"beat-{self._trial_id}", daemon=True).start()

    def before_checkpoint(self) -> None:
        """Returns when the checkpoint before is in the store; raises SupersededError."""
        self._wait(self._asked)

    def after_checkpoint(self) -> None:
        """A checkpoint is on this machine's disk: it goes up now."""
        self._ask()

    def flush(self) -> None:
        """Returns when all that is on this machine's disk is in the store; raises SupersededError."""
        self._wait(self._ask())

    def check(self) -> None:
        """Raises SupersededError where another process has taken over, and what the store has raised."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Brings the rest up, and gives the disk back; a store that is away gets a minute."""
        with self._changed:
            self._closing = True
            self._asked += 1
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive() or self._error is not None:
            reason = self._error or "it does not answer"
            log.warning("%s: its last records are not in the store: %s", self._trial_id, reason)
        self._store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self) -> int:
        with self._changed:
            self._asked += 1
            asked = self._asked
        self._wake.set()
        return asked

    def _wait(self, asked: int) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._done >= asked or bool(self._error), _EVERY_S):
                self.alive()
        self.check()

    def _run(self) -> None:
        while True:
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            with self._changed:
                asked, closing = self._asked, self._closing
            try:
                self._push()
            except Exception as error:  # raised to the one who waits, in training
                self._error = error
            with self._changed:
                self._done = asked
                self._changed.notify_all()
            if closing or self._error is not None:
                self._ended.set()
                return

    def _beat(self) -> None:
        """Signs of life, while a large checkpoint goes up for minutes."""
        while not self._ended.wait(2 * _EVERY_S):
            with self._index_lock, suppress(OSError):
                texts = dict(self._index.texts)
                for name in _SIGNS:
                    texts[name] = (self._folder / name).read_text(encoding="utf-8")
                if texts != self._index.texts:
                    self._index = replace(self._index, texts=texts, beats=self._index.beats + 1)
                    self._put_index()

    def _push(self) -> None:
        """Checkpoints first, then reports, records, pictures: what comes later tells of what came before."""
        before = self._index
        index = replace(before, files=dict(before.files), texts=dict(before.texts))
        self._add_checkpoints(index)
        for name in _TEXTS:
            with suppress(FileNotFoundError):
                index.texts[name] = (self._folder / name).read_text(encoding="utf-8")
        self._drop_checkpoints(index)
        self._records.push()
        index.records_bytes = self._records.size
        for path in (*(self._folder / "grids").glob("[0-9]*.png"), self._folder / "mask.png"):
            with suppress(FileNotFoundError):
                self._add_file(index, path)
        if index == before:
            return
        self._rounds_unseen += 1
        if index.files != before.files or self._rounds_unseen >= _ROUNDS_UNSEEN:
            self._see_whether_superseded()
        with self._index_lock:
            self._index = replace(index, beats=self._index.beats + 1)
            self._put_index()
        dropped = {stored.key for stored in before.files.values()} - {s.key for s in index.files.values()}
        self._store.delete(sorted(dropped))

    def _add_checkpoints(self, index: Index) -> None:
        there = index.checkpoints()
        for folder in sorted((self._folder / "checkpoints").glob("[0-9]*")):
            if int(folder.name) in there:
                continue
            # One that is not the newest may go meanwhile.
            with suppress(FileNotFoundError):
                try:
                    sums = read_json(folder / _MANIFEST)
                except ConfigError as error:
                    log.warning("%s: a checkpoint stays out of the store: %s", self._trial_id, error)
                    continue
                sums[_MANIFEST] = sha256_of(folder / _MANIFEST)
                names = {name: f"checkpoints/{folder.name}/{name}" for name in sums}
                index.files |= {
                    file: self._put_file(file, folder / name, sums[name]) for name, file in names.items()
                }

    def _drop_checkpoints(self, index: Index) -> None:
        """Those that the trial itself does not keep: all but the newest and that of its best report."""
        there = index.checkpoints()
        best = json.loads(index.texts.get("best.json", "{}")).get("step")
        if not there or best not in (None, *there):
            # The best one is still to come: until then the one before it is the best.
            return
        keep = {int(folder.name) for folder in (self._folder / "checkpoints").glob("[0-9]*")}
        for step in set(there) - {*keep, best, max(there)}:
            for name in there[step]:
                del index.files[name]

    def _add_file(self, index: Index, path: Path) -> None:
        stat = path.stat()
        version = (stat.st_size, stat.st_mtime_ns)
        name = path.relative_to(self._folder).as_posix()
        if self._known.get(name) == version:
            return
        sha256 = sha256_of(path)
        known = index.files.get(name)
        if known is None or known.sha256 != sha256:
            index.files[name] = self._put_file(name, path, sha256)
        self._known[name] = version

    def _put_file(self, name: str, path: Path, sha256: str) -> Stored:
        key = f"trials/{self._trial_id}/{self._index.writer}/{name}"
        self._store.put_file(key, path)
        return Stored(key, path.stat().st_size, sha256)

    def _see_whether_superseded(self) -> None:
        self._rounds_unseen = 0
        entries = self._store.entries(f"index/{self._trial_id}")
        if any(writer_of(entry) > self._index.writer for entry in newest(entries).values()):
            raise SupersededError(f"{self._trial_id}: another process trains it now")

    def _put_index(self) -> None:
        self._store.put(index_name(self._trial_id, self._index.writer), self._index.encoded())
