"""Checkpoints on their way back from a store: whole and as they were written, or not there."""

import hashlib
import shutil
from pathlib import Path

from dtr_ray.storage.index import Stored
from dtr_ray.storage.store import DamagedError, Store


def fetch_checkpoint(store: Store, files: dict[str, Stored], folder: Path) -> str | None:
    """Fetches a checkpoint into a trial's folder, unless it is there; returns what is wrong with it, or None.

    Args:
        store: the sweep's.
        files: of the checkpoint, by their path in the trial's folder.
        folder: the trial's.
    """
    target = folder / Path(next(iter(files))).parent
    hidden = target.with_name(f".{target.name}.part")
    try:
        if target.is_dir():
            if all(_is_same(folder / name, stored) for name, stored in files.items()):
                return None
            shutil.rmtree(target)
        shutil.rmtree(hidden, ignore_errors=True)
        for name, stored in files.items():
            store.get_file(stored.key, hidden / Path(name).name, stored.sha256)
    except FileNotFoundError:
        return "a file is missing"
    except DamagedError as error:
        return str(error)
    hidden.rename(target)
    return None


def _is_same(path: Path, stored: Stored) -> bool:
    return path.is_file() and path.stat().st_size == stored.size and sha256_of(path) == stored.sha256


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
