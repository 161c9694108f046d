"""A trial whose files go to a store: what its workers fetch before it starts, and bring there after."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr_ray.distributed import Group
from dtr_ray.service.records import record_path
from dtr_ray.storage.checkpoints import fetch_checkpoint
from dtr_ray.storage.index import Stored
from dtr_ray.storage.store import Store
from dtr_ray.storage.trial_copy import TrialCopy


@contextmanager
def trial_copy(
    store: Mapping[str, Any] | None, group: Group, sweep_folder: Path, trial_id: str
) -> Iterator[TrialCopy | None]:
    """The main worker's: fetches the trial, and brings it to the store until the block ends.

    Raises SupersededError where another process trains it, or runs the sweep.
    """
    if store is None:
        yield None
        return
    folder = sweep_folder / "trials" / trial_id
    records = record_path(sweep_folder, trial_id, "worker")
    copy = TrialCopy(Store(store["url"]), trial_id, store["epoch"], folder, records)
    copy.fetch()
    group.from_main(copy.newest_checkpoint())
    copy.start()
    try:
        yield copy
    finally:
        copy.close()
        shutil.rmtree(records.parent, ignore_errors=True)


@contextmanager
def peer_copy(store: Mapping[str, Any], group: Group, folder: Path) -> Iterator[None]:
    """The other workers': has the newest checkpoint here, as the main worker's machine has."""
    files: dict[str, Stored] = group.from_main({})
    name = next(iter(files), None)
    if name is None or (folder / name).is_file():
        yield
        return
    damage = fetch_checkpoint(Store(store["url"]), files, folder)
    if damage is not None:
        raise OSError(f"a checkpoint in the store is damaged: {damage}")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
