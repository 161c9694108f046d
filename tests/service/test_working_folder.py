"""Relative paths of a sweep's file mean the same in its trials, wherever Ray puts their processes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sweeps import folder_of, records, tiny_sweep

from dtr_ray.diffusion.affinity import Affinity
from dtr_ray.service.sweep import run_sweep


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "workers", [pytest.param(1, id="tune"), pytest.param(2, id="train", marks=pytest.mark.slow)]
)
def test_trials_find_files_by_paths_relative_to_where_the_sweep_was_started(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number}.png")
    Affinity(np.eye(8), np.arange(8) * 100, 1000).save(Path("affinity.npz"))
    config = tiny_sweep(
        Path("runs"),
        trial__data={"name": "folder", "path": "pictures", "resolution": 8},
        trial__weighting={
            "name": "ant_uw",
            "num_clusters": 4,
            "intervals": {"name": "affinity", "from": "affinity.npz"},
        },
        trial__training__num_steps=4,
        trial__evaluation__every_steps=4,
        trial__evaluation__grid_images=4,
        space={"routing.alpha": {"type": "choice", "values": [4.0]}},
        early_stopping={"name": "none"},
        search__num_trials=1,
        resources__workers_per_trial=workers,
    )
    run_sweep(config, folder_of(config))
    (record,) = records(folder_of(config)).values()
    assert (record.status, record.reason) == ("completed", "")
