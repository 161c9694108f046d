"""An attempt's index: which files of a trial are in the store, and where.

It is put after all that it tells of, in one object, so that whoever reads it finds a trial as it was at one
moment. Small files that change often are in it themselves.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.files import is_inside, needed, parse_json
from dtr_ray.storage.store import Entry, Store

FOLDER = "index"


@dataclass(frozen=True)
class Stored:
    """A file that is in the store."""

    key: str
    """Its object."""
    size: int
    sha256: str


@dataclass
class Index:
    """What an attempt has brought to the store, and what it took over from those before."""

    writer: str = ""
    attempt: int = 0
    files: dict[str, Stored] = field(default_factory=dict)
    """By their path in the trial's folder."""
    texts: dict[str, str] = field(default_factory=dict)
    """Small files, whole."""
    records_bytes: int = 0
    """Of the attempt's own MLflow records, those that are in the store."""
    beats: int = 0
    """Grows with each put, so that no two in a second look the same."""

    def checkpoints(self) -> dict[int, dict[str, Stored]]:
        """The files of each checkpoint by training step, oldest first."""
        found: dict[int, dict[str, Stored]] = {}
        for name in sorted(self.files):
            parts = name.split("/")
            if len(parts) == 3 and parts[0] == "checkpoints" and parts[1].isdecimal():
                found.setdefault(int(parts[1]), {})[name] = self.files[name]
        return dict(sorted(found.items()))

    def encoded(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, content: bytes, where: str) -> "Index":
        """From JSON; raises ConfigError, which names the object, where it is damaged."""
        found = parse_json(content, where, dict)
        needed(found, {"writer": str, "attempt": int, "files": dict, "texts": dict, "records_bytes": int},
               where)  # fmt: skip
        files = {name: _stored(name, values, where) for name, values in found["files"].items()}
        if not all(is_inside(name) and isinstance(text, str) for name, text in found["texts"].items()):
            raise ConfigError(f"{where} is damaged: its texts are no files")
        return cls(
            found["writer"], found["attempt"], files, found["texts"], found["records_bytes"],
            found.get("beats", 0),
        )  # fmt: skip


def _stored(name: str, values: Any, where: str) -> Stored:
    if not isinstance(values, dict) or not is_inside(name):
        raise ConfigError(f"{where} is damaged: {name!r:.80} is no file of a trial")
    needed(values, {"key": str, "size": int, "sha256": str}, f"{where}: {name!r:.80}")
    if not is_inside(values["key"]):
        raise ConfigError(f"{where} is damaged: {values['key']!r:.80} leads out of the store's folder")
    return Stored(values["key"], values["size"], values["sha256"])


def index_name(trial_id: str, writer: str) -> str:
    """The object of an attempt's index."""
    return f"{FOLDER}/{trial_id}/{writer}.json"


def newest(entries: list[Entry]) -> dict[str, Entry]:
    """The index that counts, by trial, among the entries of a listing."""
    found: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.name.split("/")
        if len(parts) == 3 and parts[0] == FOLDER and parts[2].endswith(".json"):
            # Writers of a trial sort by their names.
            found[parts[1]] = max(found.get(parts[1], entry), entry, key=lambda each: each.name)
    return found


def writer_of(entry: Entry) -> str:
    """Who has put an index."""
    return entry.name.rpartition("/")[2].removesuffix(".json")


def read_index(store: Store, name: str) -> Index:
    """An index; raises FileNotFoundError where there is none."""
    return Index.decoded(store.get(name), f"{store.url}: {name}")


def read_newest(store: Store, trial_id: str) -> Index:
    """The index of a trial that counts; an empty one of a trial that has none."""
    entry = newest(store.entries(f"{FOLDER}/{trial_id}")).get(trial_id)
    return Index() if entry is None else read_index(store, entry.name)
