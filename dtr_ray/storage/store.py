"""Store: whole objects by name, over any of pyarrow's file systems; what fails is tried until it works."""

import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dtr_ray.config.files import is_inside
from dtr_ray.storage.address import without_secrets
from dtr_ray.storage.filesystems import open_filesystem

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
_CHUNK_BYTES = 8 * 2**20
_THREADS = 8


class StoreClosedError(OSError):
    """The store was closed while a request waited for it to come back."""


class DamagedError(OSError):
    """An object is not what was put there."""


@dataclass(frozen=True)
class Entry:
    """An object, as a listing tells it."""

    name: str
    size: int
    changed_ns: int
    """Unix time of its last change in nanoseconds, in whole seconds with some stores."""


class Store:
    """Objects below one address; may be used from several threads.

    An object is there as a whole or not at all. A request that fails is made again, after 0.5 s to 10 s, for
    as long as it takes: training and the sweep wait for a store that is away, and go on when it is back.
    """

    def __init__(self, url: str) -> None:
        """Raises ValueError for a wrong address; connects at the first request."""
        self.url = url
        self._filesystem: FileSystem | None = None
        self._base = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._away_since: float | None = None

    @property
    def away_s(self) -> float:
        """Seconds for which it has not answered; 0 where the last request went well."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Requests that wait for the store raise StoreClosedError, and so does whatever fails from now on."""
        self._closed.set()

    def check(self) -> None:
        """Writes an object, reads it and removes it; raises ValueError, in one line, where that fails."""
        name, content = f".check-{secrets.token_hex(6)}", secrets.token_bytes(16)
        try:
            _request(lambda: self._put(name, content))
            whole = _request(lambda: self._get(name)) == content
            _request(lambda: self._delete(name))
        except OSError as error:
            raise ValueError(f"the store {self.url} cannot be used: {reason_of(error)}") from None
        if not whole:
            raise ValueError(f"the store {self.url} cannot be used: it gives back other bytes than it got")

    def put(self, name: str, content: bytes) -> None:
        """Puts an object, in place of what was there."""
        self._try(name, lambda: self._put(name, content))

    def put_file(self, name: str, path: Path) -> None:
        """Puts a file's content; raises FileNotFoundError where the file is gone."""
        self._try(name, lambda: self._put_file(name, path))

    def get(self, name: str) -> bytes:
        """An object's content; raises FileNotFoundError where there is none."""
        return self._try(name, lambda: self._get(name))

    def get_file(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Writes an object to a file, which appears as a whole.

        Raises FileNotFoundError where there is no object, DamagedError where its SHA-256 is another one.
        """
        self._try(name, lambda: self._get_file(name, path, sha256))

    def entries(self, folder: str = "", *, deep: bool = True) -> list[Entry]:
        """All objects below a folder (`deep`: in those in it, too), by name; none where there is none."""
        return self._try(folder, lambda: self._entries(folder, deep))

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are no error."""
        for name in names:
            self._try(name, lambda name=name: self._delete(name))  # type: ignore[misc]

    def delete_folder(self, folder: str) -> None:
        """Removes all objects below a folder."""
        assert folder
        self._try(folder, lambda: self._delete_folder(folder))

    def each(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Calls `work` for each item, several at a time; raises what the first of them raised."""
        items = list(items)
        if len(items) < 2:
            for item in items:
                work(item)
            return
        with ThreadPoolExecutor(_THREADS, "store") as pool:
            list(pool.map(work, items))

    def _try(self, name: str, request: Callable[[], Result]) -> Result:
        """Makes a request until it succeeds; what is absent or damaged, or an absent file here, is raised."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                answer = _request(request)
            except (FileNotFoundError, DamagedError):
                self._answers()
                raise
            except OSError as error:
                if self._closed.is_set():
                    raise StoreClosedError(f"{self.url} is closed") from error
                self._fails(name, error)
                if self._closed.wait(wait_s):
                    raise StoreClosedError(f"{self.url} is closed") from error
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                self._answers()
                return answer

    def _fails(self, name: str, error: OSError) -> None:
        with self._lock:
            first = self._away_since is None
            if first:
                self._away_since = time.monotonic()
        if first:
            reason = reason_of(error)
            log.warning("the store %s does not take or give %s, trying again: %s", self.url, name, reason)

    def _answers(self) -> None:
        if self._away_since is None:
            return
        with self._lock:
            since, self._away_since = self._away_since, None
        if since is not None:
            log.warning("the store %s answers again, after %.0f s", self.url, time.monotonic() - since)

    def _open(self) -> "FileSystem":
        with self._lock:
            if self._filesystem is None:
                self._filesystem, self._base = open_filesystem(self.url)
            return self._filesystem

    def _path(self, name: str) -> str:
        # Names come out of index files as well.
        if name and not is_inside(name):
            raise DamagedError(f"{name!r:.80} leads out of the store's folder; refused")
        return f"{self._base}/{name}" if name else self._base

    def _local(self, filesystem: "FileSystem") -> bool:
        return bool(filesystem.type_name == "local")

    def _put(self, name: str, content: bytes) -> None:
        filesystem = self._open()
        path = self._path(name)
        if self._local(filesystem):
            _write(Path(path), [content])
            return
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _put_file(self, name: str, source: Path) -> None:
        filesystem = self._open()
        path = self._path(name)
        with source.open("rb") as file:
            chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
            if self._local(filesystem):
                _write(Path(path), chunks)
                return
            size = 0
            with filesystem.open_output_stream(path) as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    size += len(chunk)
        found = filesystem.get_file_info(path).size
        if found != size:
            raise OSError(f"{found} of {size} bytes were taken")

    def _get(self, name: str) -> bytes:
        filesystem = self._open()
        with filesystem.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def _get_file(self, name: str, path: Path, sha256: str | None) -> None:
        filesystem = self._open()
        digest = hashlib.sha256()
        with filesystem.open_input_stream(self._path(name)) as stream:

            def chunks() -> Iterable[bytes]:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
                if sha256 not in (None, digest.hexdigest()):
                    raise DamagedError(f"{name} is not as it was written")

            _write(path, chunks())

    def _entries(self, folder: str, deep: bool) -> list[Entry]:
        from pyarrow.fs import FileSelector, FileType

        filesystem = self._open()
        above = self._path("")
        found = filesystem.get_file_info(
            FileSelector(self._path(folder), allow_not_found=True, recursive=deep)
        )
        entries = [
            Entry(info.path[len(above) :].lstrip("/"), info.size, info.mtime_ns)
            for info in found
            # Hidden: what a crash left half written in a folder.
            if info.type == FileType.File and not info.base_name.startswith(".part-")
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def _delete(self, name: str) -> None:
        filesystem = self._open()
        with suppress(FileNotFoundError):
            filesystem.delete_file(self._path(name))

    def _delete_folder(self, folder: str) -> None:
        filesystem = self._open()
        with suppress(FileNotFoundError):
            filesystem.delete_dir(self._path(folder))


def _request(request: Callable[[], Result]) -> Result:
    """Makes a request; raises OSError for whatever a store answers."""
    from pyarrow import ArrowException

    try:
        return request()
    except ArrowException as error:
        raise OSError(str(error)) from error


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    """A file on this machine's disk, whole or absent, and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{secrets.token_hex(6)}")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def reason_of(error: BaseException) -> str:
    """Why a store failed, in one line without secrets."""
    return without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__
