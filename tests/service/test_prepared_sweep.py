"""A sweep whose trials share a prepared folder."""

from pathlib import Path

import numpy as np
import pytest
from prepared_folders import FolderWriter
from tiny_sweeps import folder_of, records, tiny_sweep

from dtr_ray.service.sweep import run_sweep


# Two trials of one process each, side by side; or one of two workers.
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_trials_of_a_sweep_read_the_prepared_folder(ray_cluster: str, tmp_path: Path, workers: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    writer = FolderWriter(tmp_path / "pixels", [16, 16, 8], resolution=8, num_classes=4)
    writer.pixels(pixels).reference_of(np.random.default_rng(1).random((40, 1280), np.float32)).write()
    config = tiny_sweep(
        tmp_path,
        trial__data=writer.data(horizontal_flip=True),
        trial__training__num_steps=4,
        trial__evaluation__every_steps=4,
        space={"routing.alpha": {"type": "choice", "values": [4.0]}},
        early_stopping={"name": "none"},
        search__num_trials=2 if workers == 1 else 1,
        resources__workers_per_trial=workers,
    )
    run_sweep(config, folder_of(config))
    found = records(folder_of(config)).values()
    assert [(record.status, record.reason) for record in found] == [("completed", "")] * len(found)
    assert len(found) == config.search.num_trials
