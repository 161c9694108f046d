"""Files that appear whole under their names, with their checksums; a full disk is told as one."""

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from dtr_ray.data.manifest import FileEntry

_PARTIAL = ".partial."
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(RuntimeError):
    """The disk that is written to is full; what was complete before still is."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when all went well, replacing what was there.

    Raises:
        DiskFullError: there was no room for it.
    """
    temporary = partial_name(path)
    with full_disk(path):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all; raises DiskFullError."""
    with whole_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=True).encode("ascii"))


def entry_of(path: Path) -> FileEntry:
    """Size and checksum of a file as it is on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(sha256=digest, num_bytes=file.tell())


def partial_name(path: Path) -> Path:
    """Where this process writes what is to be `path`: no other one writes there."""
    return path.with_name(f".{socket.gethostname()}-{os.getpid()}{_PARTIAL}{path.name}")


def remove_partial_files(folder: Path) -> None:
    """Removes what killed processes left below a folder."""
    for path in folder.rglob(f".*{_PARTIAL}*"):
        path.unlink(missing_ok=True)


class ArrayFile:
    """An .npy file that grows by rows, in little memory, and appears when it is closed."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        """Rows of `shape` and `dtype`; the file is opened with the first of them."""
        self._path = path
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._temporary = partial_name(path)
        self._file: BinaryIO | None = None
        self._num_rows = 0
        self._start = 0

    def append(self, rows: np.ndarray) -> None:
        """Writes rows (n, *shape) at the end; raises DiskFullError."""
        assert rows.shape[1:] == self._shape
        assert rows.dtype == self._dtype
        with full_disk(self._path):
            if self._file is None:
                self._temporary.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._temporary.open("w+b")
                self._write_header()
                self._start = self._file.tell()
            self._file.write(np.ascontiguousarray(rows).data)
        self._num_rows += len(rows)

    def close(self) -> FileEntry | None:
        """Gives the file its name; None, and no file, where there are no rows. Raises DiskFullError."""
        if self._file is None:
            return None
        with full_disk(self._path), self._file as file:
            # numpy leaves room for the number of rows to grow: the header is as long as before.
            file.seek(0)
            self._write_header()
            assert file.tell() == self._start
            file.flush()
            os.fsync(file.fileno())
        entry = entry_of(self._temporary)
        self._temporary.replace(self._path)
        self._file = None
        return entry

    def discard(self) -> None:
        """Removes what was written, unless it has been closed."""
        if self._file is not None:
            # On a full disk closing fails once more, for what was still to be written.
            with suppress(OSError):
                self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        assert self._file is not None
        descr = npy_format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._num_rows, *self._shape)}
        npy_format.write_array_header_2_0(self._file, header)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turns the error of a full disk, while `path` is written, into a DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"no room for {path}: {error.strerror}") from error
        raise
