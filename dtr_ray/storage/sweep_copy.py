"""SweepCopy: what a sweep's driver keeps in the store, and gets back from there on another machine."""

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dtr_ray.storage.lease import Lease, newest_whole
from dtr_ray.storage.pieces import PieceWriter, read_all_pieces
from dtr_ray.storage.store import Store, StoreClosedError

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
_FILES = ("sweep.json", "identity", "best.json", "trials.csv", "montage.png")
_TRIAL_FILES = ("tracking/{}/driver.jsonl", "trials/{}/error.txt")
_SWEEP_RUN = "sweep"
# In the folder: the writer whose journal is there.
_MARK = ".writer"
_EVERY_S = 5.0
_CLOSE_TIMEOUT_S = 30.0


class SweepCopy:
    """A sweep's folder on the driver's machine, and its files in the store."""

    def __init__(self, store: Store, folder: Path) -> None:
        """`folder` is the sweep's, on this machine's own disk."""
        self.store, self.folder = store, folder
        self._lease: Lease | None = None
        self._journal: PieceWriter | None = None
        self._versions: dict[str, tuple[int, int]] = {}
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        """Of this driver, for the trials that it starts."""
        assert self._lease is not None
        return self._lease.epoch

    def fetch(self) -> None:
        """Makes the folder what the store has; one that has gone another way is set aside.

        Raises DamagedError where the store lacks a part of the journal.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = newest_whole(self.store)
        journal, mark = self.folder / JOURNAL, self.folder / _MARK
        local = journal.read_bytes() if journal.exists() else None
        if writer is None:
            if local is not None:
                self._set_aside()
            return
        there = read_all_pieces(self.store, f"journal/{writer}")
        same = local is not None and mark.exists() and mark.read_text(encoding="utf-8") == writer
        # What is here beyond it was on its way when the process that wrote both was ended.
        if same and local is not None and local.startswith(there):
            return
        self._set_aside()
        names = [entry.name for entry in self.store.entries(deep=False) if entry.name in _FILES]
        names += [entry.name for entry in self.store.entries("tracking")]
        self.store.each(lambda name: self.store.get_file(name, self.folder / name), names)
        journal.write_bytes(there)
        mark.write_text(writer, encoding="utf-8")

    def take(self) -> None:
        """Takes the sweep over, and fetches what its former driver has left.

        Raises ValueError where another process runs it.
        """
        self._lease = Lease.after(self.store)
        self._lease.renew()
        self.fetch()

    def start(self, fenced: Callable[[str], None]) -> None:
        """Brings everything up, and keeps it up to date from now on.

        `fenced` is called, from a thread, with the one who has taken the sweep over.
        """
        lease = self._lease
        assert lease is not None
        self._journal = PieceWriter(self.store, f"journal/{lease.writer}", self.folder / JOURNAL)
        self._journal.push()
        self.push()
        lease.whole = True
        lease.renew()
        (self.folder / _MARK).write_text(lease.writer, encoding="utf-8")
        lease.tidy()
        for writer in {entry.name.split("/")[1] for entry in self.store.entries("journal")}:
            if writer < lease.writer:
                self.store.delete_folder(f"journal/{writer}")
        self._thread = threading.Thread(target=self._run, args=(lease, fenced), name="store", daemon=True)
        self._thread.start()

    def push_journal(self) -> None:
        """Returns when the store has every event that is in the journal."""
        assert self._journal is not None
        with self._lock:
            try:
                self._journal.push()
            except StoreClosedError:
                text = "%s: the last events are not in the store: resume on this machine, which has them"
                log.warning(text, self.store.url)

    def changed(self, trial_id: str) -> None:
        """The trial's own files have changed."""
        self._changed.add(trial_id)

    def push(self) -> None:
        """Brings up what has changed."""
        with self._lock:
            trials = {_SWEEP_RUN, *self._changed}
            self._changed -= trials
            for name in (*_FILES, *(form.format(trial) for trial in sorted(trials) for form in _TRIAL_FILES)):
                self._push_file(name)

    def close(self, *, ended: bool) -> None:
        """Brings up the rest; a store that is away gets half a minute. `ended`: the sweep is left for now."""
        self._ending.set()
        limit = threading.Timer(_CLOSE_TIMEOUT_S, self.store.close)
        limit.start()
        with suppress(OSError):
            if self._thread is not None:
                self._thread.join(_CLOSE_TIMEOUT_S)
            if self._journal is not None and self._lease is not None:
                self.push_journal()
                self.push()
                self._lease.renew(ended=ended)
        limit.cancel()
        self.store.close()

    def _run(self, lease: Lease, fenced: Callable[[str], None]) -> None:
        with suppress(OSError):
            while not self._ending.wait(_EVERY_S):
                successor = lease.successor()
                if successor is not None:
                    fenced(successor)
                    return
                lease.renew()
                self.push()

    def _push_file(self, name: str) -> None:
        path = self.folder / name
        with suppress(FileNotFoundError):
            stat = path.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._versions.get(name) != version:
                self.store.put_file(name, path)
                self._versions[name] = version

    def _set_aside(self) -> None:
        """Keeps what is here beside the folder, in place of what was kept there before."""
        aside = self.folder.with_name(f"{self.folder.name}.before")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for path in list(self.folder.iterdir()):
            if path.name != ".lock":
                path.rename(aside / path.name)
