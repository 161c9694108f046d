"""The digits: shapes, labels, scale; and the way from pixels to the model's input and back."""

import time
from pathlib import Path

import pytest
import torch

from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData, check_data, load_images


@pytest.fixture(scope="module")
def mnist(shared_cache: Path) -> ImageData:
    return load_images(DataConfig(), shared_cache)


def test_mnist_has_500_of_each_digit_at_16_pixels(mnist: ImageData) -> None:
    assert (len(mnist), mnist.num_classes, mnist.num_channels) == (5000, 10, 1)
    assert mnist.labels.dtype == torch.int64
    assert mnist.labels.bincount().tolist() == [500] * 10
    everything = mnist.pixels(torch.arange(5000))
    assert everything.shape == (5000, 1, 16, 16)
    assert everything.dtype == torch.uint8
    assert (everything.min(), everything.max()) == (0, 255)
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert everything[:, 0, border].max() == 0


def test_16_pixels_are_averages_of_two_by_two(mnist: ImageData, shared_cache: Path) -> None:
    full = load_images(DataConfig(resolution=28), shared_cache).pixels(torch.tensor([7]))[0, 0].float()
    row, column = 6, 5
    mean = full[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean()
    assert mnist.pixels(torch.tensor([7]))[0, 0, row + 1, column + 1] == mean.round()


def test_32_pixels_are_the_28_padded(shared_cache: Path) -> None:
    some = torch.tensor([0, 4999])
    full = load_images(DataConfig(resolution=28), shared_cache).pixels(some)
    padded = load_images(DataConfig(resolution=32), shared_cache).pixels(some)
    assert torch.equal(padded[:, :, 2:-2, 2:-2], full)
    assert padded[:, :, :2].max() == 0


@pytest.mark.parametrize(
    ("name", "resolution", "count"), [("mnist", 8, 5000), ("mnist", 40, 5000), ("digits", 16, 1797)]
)
def test_other_resolutions_keep_the_mean_brightness(
    name: str, resolution: int, count: int, shared_cache: Path
) -> None:
    config = DataConfig.from_dict({"name": name, "resolution": resolution})
    native = DataConfig.from_dict({"name": name, "resolution": 28 if name == "mnist" else 8})
    some = torch.arange(0, count, 50)
    data = load_images(config, shared_cache)
    assert len(data) == count
    resized, original = data.pixels(some), load_images(native, shared_cache).pixels(some)
    assert resized.shape[-2:] == (resolution, resolution)
    assert resized.float().mean().item() == pytest.approx(original.float().mean().item(), rel=0.05)


def test_digits_are_scaled_to_the_whole_range(shared_cache: Path) -> None:
    data = load_images(DataConfig(name="digits", resolution=8), shared_cache)
    pixels = data.pixels(torch.arange(len(data)))
    assert pixels.shape == (1797, 1, 8, 8)
    assert set(pixels.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}


def test_the_model_sees_pixels_between_minus_one_and_one_and_the_way_back_is_exact(mnist: ImageData) -> None:
    indices = torch.arange(0, 5000, 25)
    x = mnist.batch(indices)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(mnist.to_pixels(x), mnist.pixels(indices))
    assert torch.equal(
        mnist.to_pixels(torch.tensor([[[[-3.0, 0.0, 3.0]]]])).flatten(), torch.tensor([0, 128, 255])
    )


def test_flip_mirrors_only_the_chosen(mnist: ImageData) -> None:
    indices = torch.tensor([10, 2010])
    plain = mnist.batch(indices)
    flipped = mnist.batch(indices, torch.tensor([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])


def test_identity_tells_data_sets_and_resolutions_apart_and_not_runs(
    mnist: ImageData, shared_cache: Path
) -> None:
    again = load_images(DataConfig(), shared_cache)
    others = [DataConfig(resolution=8), DataConfig(name="digits", resolution=16)]
    identities = {mnist.identity, again.identity, *(load_images(o, shared_cache).identity for o in others)}
    assert mnist.identity == again.identity
    assert len(identities) == 3


def test_unconditional_digits_have_one_class(shared_cache: Path) -> None:
    data = load_images(DataConfig(name="digits", resolution=8, num_classes=1), shared_cache)
    assert data.num_classes == 1
    assert data.labels.max() == 0


def test_the_check_decodes_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    started = time.perf_counter()
    check_data(DataConfig(name="folder", path=str(tmp_path)))
    assert time.perf_counter() - started < 1


def test_a_local_vae_without_a_config_is_named(tmp_path: Path) -> None:
    for vae in (str(tmp_path), str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ValueError, match=r"data\.vae .*config\.json"):
            check_data(DataConfig(resolution=32, vae=vae))
