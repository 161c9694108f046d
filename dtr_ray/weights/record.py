"""Record: which files have been checked, so that they are not read again each time they are used."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dtr_ray.weights.download import FileFacts


@dataclass(frozen=True)
class Record:
    """Files as they were when they were found to be right."""

    commit: str | None
    """The hub's, of files from there."""
    files: dict[str, FileFacts]
    """What was checked, by the files' names below their folder."""
    stamps: dict[str, list[int]]
    """Size and time of change that they had."""

    @classmethod
    def of(cls, folder: Path, files: dict[str, FileFacts], commit: str | None = None) -> Self:
        """Of files in a folder that have just been checked."""
        return cls(commit, files, {name: _stamp(folder / name) for name in files})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """From its file; None where there is none that can be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
            return cls(content["commit"], files, content["stamps"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Lost or damaged, it is written anew when the files have been checked again.
            return None

    def write(self, path: Path) -> None:
        """To its file, whole; hold a lock meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def holds(self, folder: Path) -> bool:
        """Whether the files are in the folder, unchanged."""
        return bool(self.files) and all(
            (folder / name).is_file() and _stamp(folder / name) == self.stamps.get(name)
            for name in self.files
        )


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
