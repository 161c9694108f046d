"""Positions: how far a sweep's record files have been sent, kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_MIN_APPENDED_BYTES = 1_000_000


class Positions:
    """Byte offsets by record file, and MLflow's run ids by run key, for one place that records go to.

    The file's first line is one JSON object with all there was, the lines after it hold what was new each
    time: with thousands of runs, all of it would be too much to write for every portion sent. When the new
    lines have outgrown the first one, all is written anew as one line.

    What the file holds for another place (another server, another experiment) does not count: everything
    is sent there from its beginning. A lost or damaged file costs time only, since sending twice is safe.
    """

    def __init__(self, path: Path, destination: str) -> None:
        self._path = path
        # A hash, as an address may hold a password.
        self._destination = hashlib.sha256(destination.encode()).hexdigest()
        self._failed = False
        self._offsets: dict[str, int] = {}
        self.run_ids: dict[str, str] = {}
        self._room = 0
        """Bytes that may still be appended; none until all has been written as one line."""
        self._read()

    def offset(self, name: str) -> int:
        """Bytes of a file that are dealt with."""
        return self._offsets.get(name, 0)

    def save(self, offsets: Mapping[str, int], run_ids: Mapping[str, str]) -> None:
        """Takes new offsets, and puts everything on disk at once; a disk that fails is logged once."""
        self._offsets.update(offsets)
        new_ids = {} if run_ids == self.run_ids else dict(run_ids.items() - self.run_ids.items())
        self.run_ids.update(new_ids)
        if len(self.run_ids) > len(run_ids):
            # Some are no longer so.
            self.run_ids, self._room = dict(run_ids), 0
        line = json.dumps({"offsets": dict(offsets), "run_ids": new_ids}) + "\n"
        try:
            if len(line) <= self._room:
                self._room -= len(line)
                self._append(line)
            else:
                self._write_all()
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s): a new start would send records again", self._path, error
                )
            # A part of the line may be there: nothing may follow it.
            self._failed, self._room = True, 0
        else:
            self._failed = False

    def forget(self) -> None:
        """Nothing counts as sent any more."""
        self._offsets, self.run_ids, self._room = {}, {}, 0

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _write_all(self) -> None:
        state = {"destination": self._destination, "offsets": self._offsets, "run_ids": self.run_ids}
        text = json.dumps(state) + "\n"
        draft = self._path.with_suffix(".tmp")
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        self._room = max(_MIN_APPENDED_BYTES, len(text))

    def _read(self) -> None:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for number, line in enumerate(lines):
            try:
                state: Any = json.loads(line)
            except ValueError as error:
                which = "some" if number else "all"
                log.warning("%s is damaged (%s): %s records are sent again", self._path, error, which)
                return
            if not isinstance(state, dict) or (number == 0 and state.get("destination") != self._destination):
                return
            self._offsets.update(state.get("offsets", {}))
            self.run_ids.update(state.get("run_ids", {}))
