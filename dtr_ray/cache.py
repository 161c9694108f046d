"""The cache folder, and the one way to write to it: once, whole, under a lock."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.lib import format as npy_format


def cache_dir() -> Path:
    """Folder of everything that can be computed again: DTR_RAY_CACHE, else ~/.cache/dtr_ray."""
    return Path(os.environ.get("DTR_RAY_CACHE") or "~/.cache/dtr_ray").expanduser()


def looks_local(name: str) -> bool:
    """Whether `name` means a folder here, there or not, and not something on a hub of models."""
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "~", "/"))
        or (
            # A hub's names have one part or two; a revision after "@" may have more.
            name.partition("@")[0].count("/") > 1
        )
    )


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Makes the file `path` unless it is there; one process builds, the others wait and then read.

    Args:
        path: the file; where it exists it is complete, since it appears by renaming.
        build: writes the file at the path that it is given. Where it raises, nothing is left behind.

    Raises:
        ValueError: the folder cannot be written.
    """
    if _is_there(path):
        return path
    with locked(path):
        if not path.exists():
            _build(path, build)
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> ValueError:
    reason = error.strerror or error
    return ValueError(
        f"the cache folder {str(path.parent)[:300]} cannot be written ({reason}): set DTR_RAY_CACHE to one "
        "that can"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, which may not be there yet; raises ValueError as `build_once`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _build(path: Path, build: Callable[[Path], None]) -> None:
    # One name a host: what a killed process left is overwritten, and hosts that share the folder over a
    # file system without locks still do not write into each other's file.
    temporary = path.with_name(f".{socket.gethostname()}.partial.{path.name}")
    try:
        build(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, on disk before anything builds on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_npy(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic], chunks: Iterable[np.ndarray]
) -> None:
    """Writes an array of a known shape chunk by chunk along its first axis, in little memory.

    Plain writes, not a writable memory map: on a full disk they raise OSError, where a map kills the process.
    """
    rows = 0
    with path.open("wb") as file:
        header = {"descr": npy_format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        npy_format.write_array_header_2_0(file, header)
        for chunk in chunks:
            assert chunk.dtype == dtype
            assert chunk.shape[1:] == shape[1:]
            file.write(np.ascontiguousarray(chunk).data)
            rows += len(chunk)
    assert rows == shape[0]
