"""Image folders: which files count, how they are cropped, and that they are decoded once."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtr_ray.config import DataConfig
from dtr_ray.data import check_data, load_images
from dtr_ray.data.decoded import decode_image
from dtr_ray.data.decoding import centre_crop
from dtr_ray.data.rows import Rows
from dtr_ray.sources.folder import list_images


def _save(path: Path, size: tuple[int, int] = (20, 20), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, four images, one of them a level deeper, and files that are none."""
    root = tmp_path / "pictures"
    _save(root / "cats" / "b.png", seed=1)
    _save(root / "cats" / "a.PNG", (40, 30), seed=2)
    _save(root / "dogs" / "old" / "c.jpg", (17, 90), seed=3)
    _save(root / "dogs" / "d.webp", (16, 16), seed=4)
    (root / "dogs" / "readme.txt").write_text("not an image")
    (root / "dogs" / "._d.webp").write_text("not an image either")
    return root


def _config(path: Path, resolution: int = 16, num_classes: int | None = None) -> DataConfig:
    return DataConfig(name="folder", path=str(path), resolution=resolution, num_classes=num_classes)


def test_without_classes_every_image_at_any_depth_counts_in_order(pictures: Path, tmp_path: Path) -> None:
    files = list_images(str(pictures), 1)
    assert [p.relative_to(pictures).as_posix() for p in files.paths] == [
        "cats/a.PNG", "cats/b.png", "dogs/d.webp", "dogs/old/c.jpg"
    ]  # fmt: skip
    data = load_images(_config(pictures), tmp_path / "cache")
    assert (len(data), data.num_classes, data.labels.tolist()) == (4, 1, [0] * 4)
    assert data.pixels(torch.tensor([3, 0])).shape == (2, 3, 16, 16)


def test_classes_are_those_of_torchvision(pictures: Path) -> None:
    from torchvision.datasets import ImageFolder

    (pictures / "dogs" / "._d.webp").unlink()
    files = list_images(str(pictures), 2)
    theirs = ImageFolder(str(pictures)).samples
    assert sorted(zip(map(str, files.paths), files.labels, strict=True)) == sorted(theirs)
    assert files.labels == [0, 0, 1, 1]


def test_a_second_load_only_reads(pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_images(_config(pictures, num_classes=2), cache)
    files = {p: p.stat().st_mtime_ns for p in cache.glob("*.npy")}
    # Same sizes and times, no longer images: what is read again can only come from the cache.
    for image in list_images(str(pictures), 2).paths:
        status = image.stat()
        image.write_bytes(b"\0" * status.st_size)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = load_images(_config(pictures, num_classes=2), cache)
    assert len(files) == 1
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*.npy")} == files
    assert second.identity == first.identity
    everything = torch.arange(4)
    assert torch.equal(first.pixels(everything), second.pixels(everything))
    assert isinstance(second._pixels, Rows)
    assert second._pixels.is_mapped


def test_a_changed_file_or_resolution_is_another_data_set(pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    identities = {load_images(_config(pictures, r), cache).identity for r in (16, 8)}
    _save(pictures / "cats" / "b.png", (21, 20), seed=9)
    identities.add(load_images(_config(pictures), cache).identity)
    assert len(identities) == 3


def test_a_corrupt_image_is_named_and_leaves_no_cache(pictures: Path, tmp_path: Path) -> None:
    cut = pictures / "dogs" / "old" / "c.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"c\.jpg cannot be read as an image"):
        load_images(_config(pictures), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert not list((tmp_path / "cache").glob(".*partial*"))


def test_what_is_wrong_with_a_folder_is_said_with_path_and_counts(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (pictures / "birds").mkdir()
    cases = [
        (_config(tmp_path / "nowhere"), r"nowhere does not exist"),
        (_config(pictures / "cats" / "b.png"), r"b\.png is not a folder"),
        (_config(tmp_path / "empty"), r"no image in .*empty"),
        (_config(pictures, num_classes=2), r"num_classes is 2, but .*pictures has 3 class folders"),
        (_config(pictures, num_classes=3), r"no image in .*birds"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            check_data(config)


def test_a_link_in_a_circle_ends(pictures: Path) -> None:
    (pictures / "cats" / "again").symlink_to(pictures, target_is_directory=True)
    assert len(list_images(str(pictures), 1).paths) == 4


def test_a_link_to_nowhere_is_named(pictures: Path) -> None:
    (pictures / "cats" / "lost.png").symlink_to(pictures / "nowhere.png")
    with pytest.raises(ValueError, match=r"lost\.png cannot be read"):
        list_images(str(pictures), 1)


def test_the_crop_is_the_centre_square_at_the_shorter_side() -> None:
    stripes = np.zeros((32, 96, 3), dtype=np.uint8)
    stripes[:, :32, 0] = stripes[:, 32:64, 1] = stripes[:, 64:, 2] = 255
    for resolution in (32, 16, 8):
        cropped = np.asarray(centre_crop(Image.fromarray(stripes), resolution))
        assert cropped.shape == (resolution, resolution, 3)
        assert np.array_equal(np.unique(cropped.reshape(-1, 3), axis=0), [[0, 255, 0]])


def test_large_images_are_halved_by_averages_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    # Pillow rounds after each of the four passes, two to a halving.
    assert np.abs(np.asarray(centre_crop(Image.fromarray(pixels), 16)) - expected).max() <= 2
    odd = Image.fromarray(pixels[:, :51]).resize((151, 333))
    assert centre_crop(odd, 37).size == (37, 37)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_all_kinds_of_images_become_rgb(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 256, dtype=np.uint16))
    else:
        image = Image.new("L", (16, 16), 200).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    decoded = decode_image(path, 16)
    assert (decoded.shape, decoded.dtype) == ((3, 16, 16), np.uint8)
    assert abs(int(decoded[0, 5, 5]) - 200) <= 6


def _load(path: Path, cache: Path, digests: "multiprocessing.Queue[int]") -> None:
    data = load_images(_config(path), cache)
    digests.put(int(data.pixels(torch.arange(len(data))).long().sum()))


def test_processes_that_start_together_share_one_file(pictures: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    sums: multiprocessing.Queue[int] = context.Queue()
    cache = tmp_path / "cache"
    processes = [context.Process(target=_load, args=(pictures, cache, sums)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {sums.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(found) == 1
    assert len(list(cache.glob("*.npy"))) == 1
