"""A power-off: what was not synced is lost, in the worst way or in any other that a file system may choose.

    with power_log(folder) as power:
        ... run processes with power.env in their environment, and SIGKILL all of them
        power.cut(random.Random(1))              # or worst=True: nothing is left but what was synced
        ... resume, with power.env again; cut again, ...

A small library (power.c, by LD_PRELOAD) copies, at every fsync of a file or folder below `folder`, what is on
the disk from then on. `cut` puts the folder together anew: a file has the content of its last sync, a folder
the names of its last sync; a file or folder that was never synced is empty, if its name is there at all. With
`worst=False` each name and each file is, at random, that or what the processes last saw, or something between
(a part of what was appended, zeros in its place, old pages beside new ones). What is there afterwards is
on the disk.
"""

import ctypes
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preloaded import build

_PAGE = 4096

Entries = dict[str, tuple[str, str]]
"""(key, kind) by name; kind is f, d or o."""


@contextmanager
def power_log(folder: Path) -> Iterator["PowerLog"]:
    """Watches `folder`, which exists; what is in it now is on the disk."""
    with tempfile.TemporaryDirectory(prefix="power-") as place:
        yield PowerLog(folder.resolve(), Path(place))


@dataclass(frozen=True)
class Lost:
    """What a power-off has taken."""

    names: list[str]
    """New names that are gone, and old ones that are back."""
    contents: list[str]
    """Files with another content than the processes last saw."""


class PowerLog:
    """See the module."""

    def __init__(self, folder: Path, place: Path) -> None:
        self._folder, self._place = folder, place
        library = build("power", place)
        self._library = ctypes.CDLL(str(library))
        self.env = {"LD_PRELOAD": str(library), "POWER_FOLDER": str(folder), "POWER_LOG": str(place)}
        """For the processes' environment."""
        self.book()

    def cut(self, rng: random.Random, *, worst: bool = False) -> Lost:
        """Leaves of the folder what a power-off now would; all processes with `env` are dead."""
        lost = Lost([], [])
        with tempfile.TemporaryDirectory(prefix="power-cut-", dir=self._folder.parent) as place:
            made = Path(place) / "made"
            self._make(made, self._key(self._folder), self._folder, rng, worst, lost)
            for old in list(self._folder.iterdir()):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            for new in list(made.iterdir()):
                new.rename(self._folder / new.name)
        self.book()
        return lost

    def _make(
        self, target: Path, key: str, seen: Path | None, rng: random.Random, worst: bool, lost: Lost
    ) -> None:
        """The folder `key`; `seen` is where the processes had it, if they still did."""
        target.mkdir()
        before = self._entries(key)
        now = {} if seen is None else self._entries_now(seen)
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name), now.get(name)
            kept = old if worst or rng.random() < 0.5 else new
            if kept != new:
                lost.names.append(str(self._shown(seen, name)))
            if kept is None or kept[1] == "o":
                continue
            current = seen / name if seen is not None and kept == new else None
            if kept[1] == "d":
                self._make(target / name, kept[0], current, rng, worst, lost)
                continue
            synced = self._place / "files" / kept[0]
            durable = synced.read_bytes() if synced.exists() else b""
            last = durable if current is None else current.read_bytes()
            content = durable if worst else _between(durable, last, rng)
            if content != last:
                lost.contents.append(str(self._shown(seen, name)))
            (target / name).write_bytes(content)

    def _shown(self, folder: Path | None, name: str) -> Path:
        return Path(name) if folder is None else (folder / name).relative_to(self._folder)

    def _entries(self, key: str) -> Entries:
        path = self._place / "folders" / key
        if not path.exists():
            return {}
        lines = (line.split(" ", 2) for line in path.read_text().splitlines())
        return {name: (own, kind) for own, kind, name in lines}

    def _entries_now(self, folder: Path) -> Entries:
        found = {}
        for path in folder.iterdir():
            kind = "o" if path.is_symlink() else "d" if path.is_dir() else "f" if path.is_file() else "o"
            found[path.name] = (self._key(path), kind)
        return found

    def _key(self, path: Path) -> str:
        key = ctypes.create_string_buffer(64)
        if self._library.power_key(os.fsencode(path), key, 64):
            raise FileNotFoundError(path)
        return key.value.decode()

    def book(self) -> None:
        """Takes all that is there for synced; nobody writes meanwhile."""
        for kind in ("files", "folders"):
            shutil.rmtree(self._place / kind, ignore_errors=True)
            (self._place / kind).mkdir()
        for folder, _, files in os.walk(self._folder):
            entries = self._entries_now(Path(folder))
            lines = "".join(f"{key} {kind} {name}\n" for name, (key, kind) in entries.items())
            (self._place / "folders" / self._key(Path(folder))).write_text(lines)
            for name in files:
                if entries[name][1] == "f":
                    shutil.copyfile(Path(folder) / name, self._place / "files" / entries[name][0])


def _between(durable: bytes, last: bytes, rng: random.Random) -> bytes:
    """What a file system may make of a file that was `durable` when synced, and `last` when power went."""
    if durable == last:
        return last
    if last.startswith(durable):
        part = durable + last[len(durable) : rng.randint(len(durable), len(last))]
        return rng.choice(
            [durable, last, part, durable.ljust(len(last), b"\0"), part.ljust(len(last), b"\0")]
        )
    size = max(len(durable), len(last))
    pages = [rng.choice([durable, last])[at : at + _PAGE] for at in range(0, size, _PAGE)]
    return rng.choice([durable, last, b"".join(pages)])
