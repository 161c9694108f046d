"""Downloads one file: resumed where it was cut off, checked, and in place only when it is whole and right."""

import hashlib
import http.client
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from dtr_ray import __version__
from dtr_ray.cache import sync

OnBytes = Callable[[int], None]
"""Hears how many bytes of the file are here, every few."""

# Between two packets; a server that is not there costs no more than twice this.
_TIMEOUT_S = 10.0
# How often it is tried again without a new byte in between.
_MAX_FAILURES = 3
_PAUSE_S = 0.5
_CHUNK_BYTES = 1 << 20
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file before it is here."""

    size: int | None = None
    checksum: str | None = None
    """`sha256:<hex>`, or `git:<hex>`, git's SHA-1 of a blob."""

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file at `path`; None where it is the right one."""
        found = path.stat().st_size
        if self.size is not None and found != self.size:
            return f"has {found:,} bytes, not {self.size:,}"
        if self.checksum is None:
            return None
        kind, _, expected = self.checksum.partition(":")
        value = _digest(path, kind)
        return None if value == expected else f"has the {_NAMES[kind]} {value}, not {expected}"


class DownloadError(Exception):
    """A file that cannot be had; the message says why, in one line."""

    def __init__(self, message: str, code: int | None = None, reason: str | None = None) -> None:
        """`code` is HTTP's, `reason` the hub's own word for it; without a code nobody answered."""
        super().__init__(message)
        self.code = code
        self.reason = reason


class _CutError(Exception):
    """The connection broke, or the server has trouble of its own: worth another try."""


_NAMES = {"sha256": "SHA-256", "git": "git hash"}


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        if kind == "sha256":
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_url(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A short answer, such as a list of files; raises DownloadError."""
    failures = 0
    while True:
        try:
            with _open(url, headers or {}) as response:
                data: bytes = response.read()
                return data
        except (_CutError, OSError, http.client.HTTPException) as error:
            failures += 1
            if failures == _MAX_FAILURES:
                raise DownloadError(_line(error)) from error
            time.sleep(_PAUSE_S * failures)


def check_url(url: str) -> None:
    """Asks for the file at `url` and reads nothing of it; raises DownloadError where it is not to be had."""
    try:
        _open(url, {}).close()
    except (_CutError, OSError, http.client.HTTPException) as error:
        raise DownloadError(_line(error)) from error


def download(
    url: str,
    path: Path,
    facts: FileFacts,
    headers: Mapping[str, str] | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Writes the file at `url` to `path`, which appears whole and checked; hold a lock meanwhile.

    What a killed or failed attempt has got is kept beside it, and the next one goes on from there.

    Args:
        url: http, https or file.
        path: its folder exists.
        facts: what the file is to be.
        headers: for the server; `Authorization` is not handed on where it sends elsewhere.
        on_bytes: see OnBytes.

    Raises:
        DownloadError: it cannot be had, or is another file, also at the second time.
    """
    # One name a host: a file system without locks may be shared by several.
    partial = path.with_name(f".{socket.gethostname()}.partial.{path.name}")
    fault = None
    for _ in range(2):
        _receive_all(url, partial, facts, headers or {}, on_bytes)
        fault = facts.fault(partial)
        if fault is None:
            break
        partial.unlink()
    else:
        raise DownloadError(f"what {url} sends {fault}")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _receive_all(
    url: str, partial: Path, facts: FileFacts, headers: Mapping[str, str], on_bytes: OnBytes
) -> None:
    """Goes on receiving until `partial` is whole; gives up when that gets no further."""
    failures, at_first = 0, _size(partial)
    while True:
        before = _size(partial)
        try:
            _receive(url, partial, facts, headers, on_bytes)
        except (DownloadError, _CutError, OSError, http.client.HTTPException) as error:
            # A server that was never there is given up at once: a machine without a network is not to wait.
            if isinstance(error, DownloadError) and (error.code or _size(partial) == at_first):
                raise
            failures = 0 if _size(partial) > before else failures + 1
            if failures == _MAX_FAILURES:
                raise DownloadError(_line(error)) from error
            time.sleep(_PAUSE_S * (failures + 1))
        else:
            return


def _receive(
    url: str, partial: Path, facts: FileFacts, headers: Mapping[str, str], on_bytes: OnBytes
) -> None:
    """Adds to `partial` what it lacks of the file."""
    start = _size(partial)
    if facts.size is not None and start >= facts.size:
        if start == facts.size:
            return
        partial.unlink()
        start = 0
    try:
        response = _open(url, {**headers, "Range": f"bytes={start}-"} if start else headers)
    except DownloadError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # What is here is not the beginning of what is there.
            partial.unlink()
            raise _CutError(str(error)) from error
        raise
    with response:
        if not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers.get("Content-Length")
        here = start
        # Unbuffered, each part as it comes: what is here when the process is killed need not come again.
        with partial.open("ab" if start else "wb", buffering=0) as file:
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                here += len(chunk)
                on_bytes(here)
    if length is not None and here < start + int(length):
        raise _CutError(f"{url}: the connection ended after {here:,} of {start + int(length):,} bytes")


def _open(url: str, headers: Mapping[str, str]) -> Any:
    """The server's answer; DownloadError where it is a refusal or there is no server."""
    if url.partition(":")[0] not in ("http", "https", "file"):
        raise DownloadError(f"{url} is no address: it must begin with http://, https:// or file://")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"dtr_ray/{__version__}"})  # noqa: S310
    except ValueError as error:
        raise DownloadError(f"{url} is no address: {error}") from error
    for name, value in headers.items():
        if name == "Authorization":
            request.add_unredirected_header(name, value)
        else:
            request.add_header(name, value)
    try:
        return _answer(request)
    except (ValueError, OverflowError) as error:
        raise DownloadError(f"{url} is no address: {error}") from error
    except urllib.error.HTTPError as error:
        with error:
            message = f"{url} answers {error.code} {error.reason}"
            if error.code in _TRY_AGAIN:
                raise _CutError(message) from error
            raise DownloadError(message, error.code, error.headers.get("X-Error-Code")) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionResetError | BrokenPipeError):
            raise _CutError(f"{_host(url)}: {error.reason}") from error
        raise DownloadError(f"{_host(url)} cannot be reached: {_line(error.reason)}") from error
    except TimeoutError as error:
        raise DownloadError(f"{_host(url)} does not answer") from error


def _answer(request: urllib.request.Request) -> Any:
    """What the server answers; raises TimeoutError, and what urllib raises."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=_TIMEOUT_S))  # noqa: S310
        except Exception as error:  # raised to the one who waits
            answers.put(error)

    # In a thread, since urllib's time limit is for each of a host's addresses, and none for finding them.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * _TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _host(url: str) -> str:
    return "/".join(url.split("/")[:3]) if url.startswith("http") else url


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
