"""What a command reads of a sweep in a store: fetched to this machine's own disk, as the folder it knows."""

import json
from pathlib import Path
from typing import Any, Literal

from dtr_ray.config.files import is_inside
from dtr_ray.storage.address import check_address, divided, joined, scratch_folder
from dtr_ray.storage.checkpoints import fetch_checkpoint
from dtr_ray.storage.index import FOLDER, Index, newest, read_index, read_newest
from dtr_ray.storage.lease import newest_whole
from dtr_ray.storage.pieces import read_all_pieces
from dtr_ray.storage.store import DamagedError, Store, reason_of
from dtr_ray.storage.sweep_copy import JOURNAL

Checkpoints = Literal["none", "best", "all"]

_SWEEP_FILES = ("sweep.json", "identity", "best.json", "trials.csv", "montage.png")


def fetch_folder(url: str, checkpoints: Checkpoints = "best") -> Path:
    """A folder on this machine with what lies at an address.

    Args:
        url: of a sweep, of a trial in it (`.../trials/t0001`), of a trial's checkpoint
            (`.../trials/t0001/checkpoints/00001000`), or of a folder of plain files, such as an export.
        checkpoints: which of a sweep are fetched.

    Raises:
        ValueError: the store does not answer, or has nothing there.
    """
    check_address(url)
    sweep_url, trial, step = _parts(url)
    store = Store(sweep_url)
    store.close()  # Nothing is lost where a command ends at once.
    try:
        writer = newest_whole(store)
        if writer is None:
            return _fetch_plain(url)
        folder = scratch_folder(sweep_url, "copy")
        if trial is None:
            _fetch_sweep(store, writer, folder, checkpoints)
            return folder
        index = read_newest(store, trial)
        _fetch_trial(store, index, folder / "trials" / trial, None if step is None else {step})
    except OSError as error:
        reason = reason_of(error.__cause__ or error)
        raise ValueError(f"{url} cannot be read: {reason}") from None
    found = folder / "trials" / trial
    found = found if step is None else found / "checkpoints" / f"{step:08d}"
    if not found.is_dir():
        raise ValueError(f"{url}: there is no such {'trial' if step is None else 'checkpoint'} in the sweep")
    return found


def put_beside(url: str, path: Path) -> None:
    """Puts a file that a command has made into the sweep's folder; raises ValueError where that fails."""
    store = Store(url)
    store.close()
    try:
        store.put_file(path.name, path)
    except OSError as error:
        reason = reason_of(error.__cause__ or error)
        raise ValueError(f"{joined(url, path.name)} cannot be written: {reason}") from None


def _parts(url: str) -> tuple[str, str | None, int | None]:
    """The sweep's address, and the trial and the checkpoint's step where the address names them."""
    above, name = divided(url)
    above_2, name_2 = divided(above)
    if name_2 == "trials":
        return above_2, name, None
    if name_2 == "checkpoints" and name.isdecimal():
        trials, trial = divided(above_2)
        sweep, folder = divided(trials)
        if folder == "trials":
            return sweep, trial, int(name)
    return url, None, None


def _fetch_sweep(store: Store, writer: str, folder: Path, checkpoints: Checkpoints) -> None:
    names = {entry.name for entry in store.entries(deep=False)}
    for name in _SWEEP_FILES:
        (folder / name).unlink(missing_ok=True)
        if name in names:
            store.get_file(name, folder / name)
    journal = read_all_pieces(store, f"journal/{writer}")
    (folder / JOURNAL).write_bytes(journal)
    indices = newest(store.entries(FOLDER))
    if checkpoints == "all":
        for trial, entry in indices.items():
            _fetch_trial(store, read_index(store, entry.name), folder / "trials" / trial, None)
    elif checkpoints == "best" and "best.json" in names:
        place = _json(folder / "best.json").get("checkpoint") or ""
        parts = place.split("/")
        if is_inside(place) and len(parts) == 4 and parts[1] in indices and parts[3].isdecimal():
            index = read_index(store, indices[parts[1]].name)
            _fetch_trial(store, index, folder / "trials" / parts[1], {int(parts[3])})


def _fetch_trial(store: Store, index: Index, folder: Path, steps: set[int] | None) -> None:
    """Its small files, and the checkpoints of these steps; default: all that are kept."""
    if not index.writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in index.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for step, files in index.checkpoints().items():
        if steps is None or step in steps:
            damage = fetch_checkpoint(store, files, folder)
            if damage is not None:
                raise DamagedError(f"the checkpoint of step {step}: {damage}")


def _fetch_plain(url: str) -> Path:
    """A folder of plain files, whole."""
    store, folder = Store(url), scratch_folder(url, "copy")
    store.close()
    entries = [entry for entry in store.entries() if is_inside(entry.name)]
    if not entries:
        raise ValueError(f"{url}: there is nothing")
    store.each(lambda entry: store.get_file(entry.name, folder / entry.name), entries)
    return folder


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
