"""Disk: files that a power-off cannot tear or take back, and patience while a disk is full.

A new name (of a file, a folder, or by a rename) lasts only when the folder that it is in has been synced;
`write_durably` and `make_folder_durably` see to that. A disk that is full ends no sweep: `with_room` waits
until there is room, saying so once, and goes on by itself.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAIT_VARIABLE = "DTR_RAY_DISK_WAIT_HOURS"
WAIT_HOURS = 24.0
WAITING = "waiting for disk"
"""The phase of a trial that waits for room."""

_LOOK_S = 2.0
# A round of `tried` is shorter than any time-out of workers that wait for the one that writes.
_MAX_LOOKS = 30
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries make of these errors, and SQLite's own.
_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "(os error 28)",
    "(os error 122)",
    "database or disk is full",
)
# File systems that keep names by themselves (FUSE, SMB) may refuse to sync a folder.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)

log = logging.getLogger(__name__)


class DiskFullError(RuntimeError):
    """A disk has stayed full for so long that there is no point in waiting on; all that was done is kept."""


class _Waiting:
    """Whether this process waits for room, and who is told that it is alive meanwhile."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.listeners: list[Callable[[], None]] = []


class _Depth(threading.local):
    """How many calls of `tried` a thread is in."""

    count = 0


_waiting, _depth = _Waiting(), _Depth()


def is_waiting() -> bool:
    """Whether this process waits for room: it does not hang then."""
    return _waiting.since is not None


@contextmanager
def tells(alive: Callable[[], None]) -> Iterator[None]:
    """Has `alive` called every few seconds while this process waits for room."""
    _waiting.listeners.append(alive)
    try:
        yield
    finally:
        _waiting.listeners.remove(alive)


def with_room(folder: Path, write: Callable[[], T], need_bytes: int = 0) -> T:
    """Calls `write`, again and again where the disk is full, until there was room for it.

    Args:
        folder: where it writes.
        write: starts over each time; leaves no half of anything in the way.
        need_bytes: how much it writes, where that is much: without so much room it is not tried again.

    Raises:
        DiskFullError: there was no room for DTR_RAY_DISK_WAIT_HOURS hours (24).
    """
    results: list[T] = []
    while not tried(folder, lambda: results.append(write()), need_bytes):
        pass
    return results[0]


def tried(folder: Path, write: Callable[[], object], need_bytes: int = 0) -> bool:
    """One round of `with_room`: true when it is written, false after a few seconds of waiting.

    What `write` itself does with room for files is tried but once: it is this call that waits.
    """
    outermost = _depth.count == 0
    _depth.count += 1
    try:
        write()
    except Exception as error:
        if not outermost or isinstance(error, DiskFullError) or not is_full(error):
            raise
        wait_for_room(folder, error, need_bytes)
        return False
    finally:
        _depth.count -= 1
    if outermost and _waiting.since is not None:
        log.warning("there is room again for %s: going on", folder)
        _waiting.since = None
    return True


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that there is no room on a disk."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_error(error: BaseException | None) -> DiskFullError | None:
    """The DiskFullError among an error and those that led to it."""
    while error is not None and not isinstance(error, DiskFullError):
        error = error.__cause__ or error.__context__
    return error


def wait_hours() -> float:
    """How long to wait for room; raises ValueError where the environment does not say it in hours."""
    text = os.environ.get(WAIT_VARIABLE) or str(WAIT_HOURS)
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise ValueError(f"{WAIT_VARIABLE} is a number of hours, not {text!r:.40}")
    return hours


def free_bytes(folder: Path) -> tuple[int, int]:
    """(free, total) bytes of the disk that a folder is on, or would be made on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    return usage.free, usage.total


def wait_for_room(folder: Path, error: BaseException, need_bytes: int = 0) -> None:
    """Waits for a few seconds, after an error that `is_full`; raises DiskFullError as `with_room`."""
    limit_s = wait_hours() * 3600
    if _waiting.since is None:
        _waiting.since = time.monotonic()
        log.warning("%s: free space there, and this goes on by itself (within %g hours, %s)",
                    _describe(folder, need_bytes, error), wait_hours(), WAIT_VARIABLE)  # fmt: skip
    by_quota, tries = _errno(error) == errno.EDQUOT, 0
    while time.monotonic() - _waiting.since < limit_s:
        tries += 1
        for alive in list(_waiting.listeners):
            alive()
        try:
            time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            # What is still to be written on the way out finds the time already over.
            _waiting.since = float("-inf")
            raise
        if by_quota or free_bytes(folder)[0] >= need_bytes or tries == _MAX_LOOKS:
            return
    what = _describe(folder, need_bytes, error)
    raise DiskFullError(f"{what}, and has been for {wait_hours():g} hours ({WAIT_VARIABLE})") from error


def _describe(folder: Path, need_bytes: int, error: BaseException) -> str:
    free, total = free_bytes(folder)
    kind = "disk quota" if _errno(error) == errno.EDQUOT else "disk"
    need = f", {_gb(need_bytes)} needed" if need_bytes else ""
    return f"the {kind} of {folder} is full ({_gb(free)} of {_gb(total)} free{need})"


def _errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        if "Disk quota exceeded" in str(error) or "(os error 122)" in str(error):
            return errno.EDQUOT
        error = error.__cause__ or error.__context__
    return None


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces a small file: after a crash or a power-off it is the old one or the new one, whole.

    It is on the disk when this returns. Waits for room as `with_room`.
    """
    data = content.encode() if isinstance(content, str) else content
    with_room(path.parent, lambda: _replace(path, data, durably=True))


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a small file so that nobody sees half of it; a power-off may take it. Does not wait."""
    _replace(path, data, durably=False)


def _replace(path: Path, data: bytes, *, durably: bool) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durably:
        sync(path.parent)


def make_folder_durably(folder: Path) -> None:
    """Makes a folder and those above it, and has their names on the disk; waits for room as `with_room`."""
    with_room(folder.parent, lambda: make_folder(folder))


def make_folder(folder: Path) -> None:
    """As `make_folder_durably`, but raises OSError where the disk is full."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Has a file's content, or the names in a folder, on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            # Names can be made in a folder that cannot be read.
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
