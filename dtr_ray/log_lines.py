"""Lines for machines: with --log-format json, or DTR_RAY_LOG=json, all that a command says is JSON.

A line is an object with `time` (ISO 8601, UTC), `level` (DEBUG to CRITICAL) and `message`; with `sweep`,
`trial` and `step` where they are known; with `event`, `status`, `metric` and `value` of what happens to a
trial; with `logger` of what is logged by a module, and `traceback`. Else the output is for people.
"""

import io
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

VARIABLE = "DTR_RAY_LOG"
FORMATS = ("text", "json")

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "interrupted": logging.WARNING}
_always: dict[str, Any] = {}
_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 - it is never changed


def chosen(given: str | None) -> str:
    """`text` or `json`: what was given, or what the environment says; raises ValueError for another word."""
    word = given or os.environ.get(VARIABLE) or FORMATS[0]
    if word not in FORMATS:
        raise ValueError(f"{VARIABLE} is text or json, not {word!r}")
    return word


def always(**fields: Any) -> None:
    """What all lines of this process are about from now on."""
    _always.update(fields)


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """What the lines that this thread says meanwhile are about."""
    before = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(before)


@contextmanager
def lines(word: str) -> Iterator[None]:
    """Has this process and those that it starts say everything in the format `word`, meanwhile.

    With `json` an error that nobody catches is a line too, and ends the process with code 1.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = word
    try:
        with _json_lines() if word == "json" else nullcontext():
            yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        _always.clear()


@contextmanager
def _json_lines() -> Iterator[None]:
    out, err = sys.stdout, sys.stderr
    handler = _handler(err)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(LineStream(out)), redirect_stderr(LineStream(err)):
            try:
                yield
            except Exception as error:
                logging.getLogger("dtr_ray").critical("%s: %s", type(error).__name__, error, exc_info=True)
                raise SystemExit(1) from error
    finally:
        logging.getLogger().removeHandler(handler)


def follow(word: str, **fields: Any) -> None:
    """In a process that Ray has started: says things as the command that it works for, about `fields`.

    It has a standard output and error of its own, which Ray keeps in its logs on that machine.
    """
    _always.clear()
    always(**fields)
    if word != "json" or isinstance(sys.stderr, LineStream):
        return
    os.environ[VARIABLE] = word
    logging.getLogger().addHandler(_handler(sys.stderr))
    logging.getLogger("dtr_ray").setLevel(logging.INFO)
    sys.stdout, sys.stderr = LineStream(sys.stdout), LineStream(sys.stderr)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        rest = {"logger": record.name} if record.name != "dtr_ray" else {}
        if record.exc_info:
            rest["traceback"] = self.formatException(record.exc_info)
        return line(record.levelname, record.getMessage(), record.created, **rest)


class LineStream(io.TextIOBase):
    """A text stream that makes each line written to it one of JSON, unless it is one; no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream below."""
        return self._stream.encoding

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The stream's below: for what writes past Python."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Takes any text; what has no end of line yet waits for it."""
        *whole, self._begun.text = (getattr(self._begun, "text", "") + text).split("\n")
        for words in whole:
            words = words.rpartition("\r")[2].strip()
            if words:
                level = _LEVELS.get(words.partition(":")[0].partition(";")[0], logging.INFO)
                # The log of a sweep on a cluster comes as lines of this kind.
                done = words.startswith('{"time": ') and words.endswith("}")
                self._stream.write((words if done else line(logging.getLevelName(level), words)) + "\n")
        if whole:
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Of the stream below; a line without its end waits on."""
        self._stream.flush()


def line(level: str, message: str, created: float | None = None, **rest: Any) -> str:
    """A line of JSON; `created` is Unix time in seconds, default: now."""
    when = datetime.now(UTC) if created is None else datetime.fromtimestamp(created, UTC)
    time = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    found = {"time": time, "level": level, "message": message, **_always, **_about.get(), **rest}
    known = {key: _plain(value) for key, value in found.items() if value is not None}
    return json.dumps(known, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _handler(stream: TextIO) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    return handler
