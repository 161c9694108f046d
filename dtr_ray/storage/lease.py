"""Lease: which process runs a sweep, where the machines have nothing in common but the store."""

import json
import os
import platform
import secrets
import time
from contextlib import suppress
from typing import Any

from dtr_ray.storage.store import Store

FOLDER = "leases"
_RENEW_S = 5.0
# A lease that has not been renewed for so long is of a process that is gone, or cut off.
_STALE_S = 20.0


class Lease:
    """Taken by a process that is to run the sweep; one with a higher epoch fences it off."""

    def __init__(self, store: Store, epoch: int) -> None:
        self._store, self.epoch = store, epoch
        self.writer = f"{epoch:06d}-{secrets.token_hex(4)}"
        self._beat = 0
        self.whole = False
        """Whether all that the sweep had before is in the store under this writer's name."""

    @classmethod
    def after(cls, store: Store) -> "Lease":
        """The lease that follows the newest one; it counts once it is put by `renew`.

        Raises ValueError where another process renews that one.
        """
        newest = newest_lease(store)
        if newest is not None:
            _wait_until_stale(store, newest)
        return cls(store, 1 if newest is None else _epoch(newest) + 1)

    def renew(self, *, ended: bool = False) -> None:
        """Says that this process runs the sweep, or has left it."""
        self._beat += 1
        content = {
            "host": platform.node(),
            "pid": os.getpid(),
            "beat": self._beat,
            "whole": self.whole,
            "ended": ended,
        }
        self._store.put(_name(self.writer), json.dumps(content).encode())

    def successor(self) -> str | None:
        """Who has taken the sweep over, in words; None while nobody has."""
        newest = newest_lease(self._store)
        if newest is None or newest <= self.writer:
            return None
        return _owner(_read(self._store, newest))

    def tidy(self) -> None:
        """Removes the leases of former processes."""
        names = [entry.name for entry in self._store.entries(FOLDER)]
        self._store.delete(name for name in names if name < _name(self.writer))


def newest_lease(store: Store) -> str | None:
    """The writer that runs the sweep, or ran it last; None where none has."""
    names = [entry.name.rpartition("/")[2] for entry in store.entries(FOLDER)]
    return max((name.removesuffix(".json") for name in names if name.endswith(".json")), default=None)


def newest_whole(store: Store) -> str | None:
    """The newest writer that has brought all of the sweep to the store; None where there is no sweep."""
    names = (entry.name.rpartition("/")[2] for entry in store.entries(FOLDER))
    writers = sorted((name.removesuffix(".json") for name in names if name.endswith(".json")), reverse=True)
    return next((writer for writer in writers if _read(store, writer).get("whole")), None)


def newest_epoch(store: Store) -> int:
    """The epoch of the newest lease, 0 where there is none."""
    newest = newest_lease(store)
    return 0 if newest is None else _epoch(newest)


def _wait_until_stale(store: Store, writer: str) -> None:
    """Returns when the lease has not been renewed for a while; raises ValueError when it is."""
    first = _read(store, writer)
    if first.get("ended") or _is_gone(first):
        return
    end = time.monotonic() + _STALE_S
    while time.monotonic() < end:
        time.sleep(_RENEW_S / 5)
        now = _read(store, writer)
        if now.get("ended"):
            return
        if now != first:
            raise ValueError(f"another process ({_owner(now)}) runs the sweep in {store.url}")


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether its process was one of this machine, and is there no more."""
    if lease.get("host") != platform.node() or not isinstance(lease.get("pid"), int):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(lease["pid"] == os.getpid())


def _read(store: Store, writer: str) -> dict[str, Any]:
    """What a lease says; nothing where it is gone or damaged."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(store.get(_name(writer)))
        return found if isinstance(found, dict) else {}
    return {}


def _owner(lease: dict[str, Any]) -> str:
    return f"host {lease.get('host', 'unknown')!s:.80}, process {lease.get('pid', 'unknown')!s:.20}"


def _name(writer: str) -> str:
    return f"{FOLDER}/{writer}.json"


def _epoch(writer: str) -> int:
    head = writer.partition("-")[0]
    return int(head) if head.isdecimal() else 0
