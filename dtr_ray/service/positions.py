"""Positions: how far a sweep's record files have been sent, kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Positions:
    """Byte offsets by record file, and MLflow's run ids by run key, for one place that records go to.

    What the file holds for another place (another server, another experiment) does not count: everything
    is sent there from its beginning. A lost or damaged file costs time only, since sending twice is safe.
    """

    def __init__(self, path: Path, destination: str) -> None:
        self._path = path
        # A hash, as an address may hold a password.
        self._destination = hashlib.sha256(destination.encode()).hexdigest()
        self._failed = False
        state = self._read()
        self._offsets: dict[str, int] = dict(state.get("offsets", {}))
        self.run_ids: dict[str, str] = dict(state.get("run_ids", {}))
        self._encoded_offsets, self._encoded_ids = _encoded(self._offsets), _encoded(self.run_ids)

    def offset(self, name: str) -> int:
        """Bytes of a file that are dealt with."""
        return self._offsets.get(name, 0)

    def save(self, offsets: Mapping[str, int], run_ids: Mapping[str, str]) -> None:
        """Takes new offsets, and puts everything on disk at once; a disk that fails is logged once."""
        self._offsets.update(offsets)
        # With thousands of runs it matters that only what has changed is encoded.
        self._encoded_offsets.update(_encoded(offsets))
        if run_ids != self.run_ids:
            self.run_ids = dict(run_ids)
            self._encoded_ids = _encoded(run_ids)
        draft = self._path.with_suffix(".tmp")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(f'{{"destination": {json.dumps(self._destination)}, "offsets": {{')
                file.write(", ".join(self._encoded_offsets.values()) + '}, "run_ids": {')
                file.write(", ".join(self._encoded_ids.values()) + "}}")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s): a new start would send records again", self._path, error
                )
            self._failed = True
        else:
            self._failed = False

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            log.warning("%s is damaged (%s): all records are sent again", self._path, error)
            return {}
        same = isinstance(state, dict) and state.get("destination") == self._destination
        return state if same else {}


def _encoded(members: Mapping[str, Any]) -> dict[str, str]:
    """The members of a JSON object, as text by key."""
    return {key: f"{json.dumps(key)}: {json.dumps(value)}" for key, value in members.items()}
