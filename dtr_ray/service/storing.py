"""A sweep whose results go to a store: its folder on the driver's machine, and what keeps both in line."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.state import Happening, SweepState
from dtr_ray.service.following import Follower
from dtr_ray.storage.address import check_address, is_url, joined, scratch_folder
from dtr_ray.storage.store import Store
from dtr_ray.storage.sweep_copy import SweepCopy

_LEAVE_S = 30.0


class SweepStorage:
    """The driver's side of a sweep in a store."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        """The sweep's own."""
        self._copy = SweepCopy(Store(url), folder)
        self._follower = Follower(self._copy.store, folder)

    def open(self) -> None:
        """Makes the folder on this machine what the store has.

        Raises ValueError, in one line, where the store cannot be written and read.
        """
        self._copy.store.check()
        self._copy.fetch()

    def settings(self) -> dict[str, Any]:
        """What a trial's process is told."""
        return {"url": self.url, "epoch": self._copy.epoch}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Runs the sweep, alone among all machines; raises ValueError where another process runs it."""
        self._copy.take()
        try:
            yield
        finally:
            self._copy.close(ended=True)

    @contextmanager
    def attached(self, state: SweepState) -> Iterator[None]:
        """Within, every event is in the store before it takes effect, and the listeners' files soon after.

        Where the block ends before its time, a store that is away is waited for no longer than half a minute.
        """
        self._copy.start(_fenced)
        state.copy_events(self._copy.push_journal)
        try:
            self._follower.start(state)
            state.listeners[:] = [self._follower, *state.listeners, self._tell]
            yield
        except BaseException:
            limit = threading.Timer(_LEAVE_S, self._copy.store.close)
            limit.daemon = True
            limit.start()
            raise
        finally:
            self._follower.close()

    def _tell(self, happening: Happening, trial: TrialRecord) -> None:
        self._copy.changed(trial.trial_id)
        if happening == "started":
            # Its run is to have a start wherever the sweep goes on.
            self._copy.push()


def open_storage(config: SweepConfig) -> SweepStorage | None:
    """The store of a sweep whose output is an address, its folder here in line; None where it is a folder.

    Raises ValueError, in one line, where the store cannot be written and read.
    """
    if not is_url(config.storage.output):
        return None
    storage = SweepStorage(joined(config.storage.output, config.name), sweep_folder(config))
    storage.open()
    return storage


def sweep_folder(config: SweepConfig) -> Path:
    """The sweep's folder on this machine: where its results are, or what it has here of those in a store."""
    output = config.storage.output
    if is_url(output):
        check_address(output)
        return scratch_folder(joined(output, config.name), "driver")
    return Path(output) / config.name


def place_of(config: SweepConfig, folder: Path) -> str:
    """The sweep's folder or address, as its user knows it."""
    output = config.storage.output
    return joined(output, config.name) if is_url(output) else str(folder)


def _fenced(successor: str) -> None:
    """Ends this process: all that it would still do is another's now."""
    print(f"error: {successor} has taken the sweep over: this process ends", file=sys.stderr, flush=True)
    # Trials that it has started see it themselves; Ray's processes on this machine die with their parent.
    os._exit(1)
