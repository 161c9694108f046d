"""A data set's identity is found out without decoding it, and is that of what is loaded."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtr_ray.cache import cache_dir
from dtr_ray.config import DataConfig
from dtr_ray.data import load_images
from dtr_ray.data.identity import data_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_it_is_that_of_the_loaded_images(folder: Path) -> None:
    for config in (
        DataConfig(name="digits", resolution=8),
        DataConfig(name="digits", resolution=8, num_classes=1),
        DataConfig(name="folder", path=str(folder), resolution=8),
    ):
        assert data_identity(config, cache_dir()) == load_images(config, cache_dir()).identity


def test_nothing_is_decoded_or_written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "c.png").write_bytes(b"no image")
    cache = tmp_path_factory.mktemp("empty")
    data_identity(DataConfig(name="folder", path=str(folder), resolution=8), cache)
    assert not list(cache.iterdir())


def test_it_changes_with_any_file(folder: Path) -> None:
    config = DataConfig(name="folder", path=str(folder), resolution=8)
    before = data_identity(config, cache_dir())
    assert data_identity(config, cache_dir()) == before
    os.utime(folder / "a.png", ns=(1, 1))
    touched = data_identity(config, cache_dir())
    (folder / "b.png").unlink()
    assert len({before, touched, data_identity(config, cache_dir())}) == 3


def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        data_identity(DataConfig(name="folder", path=str(tmp_path / "nowhere"), resolution=8), cache_dir())
