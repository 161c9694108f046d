"""Files read by number: in a folder, or as members of zips and tars, by seeking, nothing unpacked.

All may be pickled: they are arrays, and each process opens the archives for itself when it first reads.
"""

import gzip
import hashlib
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dtr_ray.cache import build_once, cache_dir
from dtr_ray.sources.listing import Names, status_of

MAX_BYTES = 1 << 30
"""A file that says it is larger is no image: it is refused before any memory is taken."""

_GZIP = b"\x1f\x8b"
_COPY_BYTES = 1 << 20
_LOCAL_HEADER = 30

_log = logging.getLogger(__name__)


class Files(Protocol):
    """Files that are read whole, by number.

    Attributes:
        names: N names, within the folder or archive.
    """

    names: Names

    def name(self, index: int) -> str:
        """What messages call the file: its path, or its archive and name in it."""

    def read(self, index: int) -> bytes:
        """Its content; raises ValueError naming it where it cannot be read."""

    def take(self, order: np.ndarray) -> "Files":
        """The files of the given numbers, int64 (M,), in that order."""


class FolderFiles:
    """Files below a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root = root
        self.names = names if isinstance(names, Names) else Names(names)

    def name(self, index: int) -> str:
        """The path."""
        return str(self._root / self.names[index])

    def read(self, index: int) -> bytes:
        """The whole file."""
        path = self.name(index)
        try:
            with open(path, "rb") as file:  # noqa: PTH123  (half the time of Path.open)
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
                return file.read()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def take(self, order: np.ndarray) -> "FolderFiles":
        """The files of the given numbers."""
        return FolderFiles(self._root, [self.names[i] for i in order.tolist()])


class Archives:
    """Some archive files, read anywhere by any thread; a .tar.gz through an uncompressed copy in the cache.

    Raises:
        ValueError: one is missing, or (when it is opened) has not the size that it had when it was listed.
    """

    # Of each thread. Shards are read one after another.
    _KEPT_OPEN = 8

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._sizes = tuple(status_of(path).st_size for path in paths)
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def read(self, number: int, start: int, size: int) -> bytes:
        """`size` bytes of an archive from `start` on; raises ValueError where there are fewer."""
        try:
            # Without a position of its own: a forked process shares the open file.
            data = os.pread(self._opened(number).descriptor, size, start)
        except OSError as error:
            raise ValueError(f"{self.paths[number]} cannot be read: {error}") from error
        if len(data) < size:
            raise ValueError(f"{self.paths[number]} ends before its byte {start + size}")
        return data

    def _opened(self, number: int) -> "_Descriptor":
        opened: dict[int, _Descriptor] = self._local.__dict__.setdefault("opened", {})
        found = opened.pop(number, None)
        if found is None:
            if len(opened) >= self._KEPT_OPEN:
                del opened[next(iter(opened))]
            path = self.paths[number]
            if path.stat().st_size != self._sizes[number]:
                raise ValueError(f"{path} has changed since its images were listed")
            found = _Descriptor(seekable(path))
        opened[number] = found
        return found


class _Descriptor:
    """An open file that closes when nothing holds it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TarFiles:
    """Members of tars: byte ranges. Arrays of N: archive's number, first byte, size."""

    def __init__(
        self, archives: Archives, names: Names, numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._archives = archives
        self.names = names
        self.numbers = numbers.astype(np.int32)
        self._starts = starts.astype(np.int64)
        self._sizes = np.minimum(sizes, np.iinfo(np.uint32).max).astype(np.uint32)

    def name(self, index: int) -> str:
        """Archive and member."""
        return f"{self.archive(index)}: {self.names[index]}"

    def archive(self, index: int) -> Path:
        """The tar that it is in."""
        return self._archives.paths[int(self.numbers[index])]

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        size = int(self._sizes[index])
        if size > MAX_BYTES:
            raise ValueError(f"{self.name(index)} has more than {MAX_BYTES} bytes")
        return self._archives.read(int(self.numbers[index]), int(self._starts[index]), size)

    def take(self, order: np.ndarray) -> "TarFiles":
        """The members of the given numbers."""
        names = Names(self.names[i] for i in order.tolist())
        return TarFiles(self._archives, names, self.numbers[order], self._starts[order], self._sizes[order])


class ZipFiles:
    """Members of one zip, stored or deflated.

    A row of `members` has the fields of `ZIP_MEMBER`.
    """

    def __init__(self, archives: Archives, names: Names, members: np.ndarray) -> None:
        self._archives = archives
        self.names = names
        self._members = members

    def name(self, index: int) -> str:
        """Archive and member."""
        return f"{self._archives.paths[0]}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        """The member's bytes, inflated, their checksum compared."""
        header, packed, size, crc, deflated = self._members[index].tolist()
        if max(packed, size) > MAX_BYTES:
            raise ValueError(f"{self.name(index)} has more than {MAX_BYTES} bytes")
        local = self._archives.read(0, header, _LOCAL_HEADER)
        if local[:4] != b"PK\x03\x04":
            raise ValueError(f"{self.name(index)} is damaged: the archive has no member where its list says")
        start = header + _LOCAL_HEADER + int.from_bytes(local[26:28], "little")
        data = self._archives.read(0, start + int.from_bytes(local[28:30], "little"), packed)
        try:
            # Not past `size`: a bomb's list of members may lie.
            data = zlib.decompressobj(-15).decompress(data, size + 1) if deflated else data
        except zlib.error as error:
            raise ValueError(f"{self.name(index)} is damaged: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError(
                f"{self.name(index)} is damaged: its size or checksum is not what the archive says"
            )
        return data

    def take(self, order: np.ndarray) -> "ZipFiles":
        """The members of the given numbers."""
        return ZipFiles(self._archives, Names(self.names[i] for i in order.tolist()), self._members[order])


ZIP_MEMBER = np.dtype(
    [("header", "<i8"), ("packed", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("deflated", "?")]
)


def seekable(path: Path) -> Path:
    """The archive itself, or where gzip packed it the copy without, which is made once a node in the cache.

    Raises:
        ValueError: it is damaged, or the cache cannot be written.
    """
    with path.open("rb") as file:
        if file.read(2) != _GZIP:
            return path
    status = path.stat()
    key = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return build_once(cache_dir() / f"unpacked-{digest}.tar", lambda copy: _unpack(path, copy))


def _unpack(path: Path, copy: Path) -> None:
    _log.warning("%s is packed as a whole: unpacked once into %s, to be read anywhere", path, copy.parent)
    try:
        with gzip.open(path) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
