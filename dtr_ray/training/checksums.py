"""Checksums: what a folder's files were when they were written, in `manifest.json` beside them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dtr_ray.config.files import is_inside, read_json

MANIFEST_FILE = "manifest.json"


def write_checksums(folder: Path, but: Iterable[str] = ()) -> None:
    """Writes the SHA-256 of all files of a folder, those of the names `but` apart."""
    left_out = {MANIFEST_FILE, *but}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder's files, in words; None where all are as they were written.

    Args:
        folder: one with checksums.
        names: look at these files alone, those of them that are there.
    """
    try:
        sums = read_json(folder / MANIFEST_FILE)
    except ValueError as error:
        return str(error)
    wanted = list(sums) if names is None else [name for name in names if (folder / name).exists()]
    for name in wanted:
        if not is_inside(name) or not isinstance(sums.get(name), str):
            return f"{MANIFEST_FILE} is damaged: it does not tell the checksum of {name!r:.80}"
        try:
            if _sha256(folder / name) != sums[name]:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
