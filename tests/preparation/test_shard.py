"""A shard: images as decoded one by one, latents as diffusers makes them, the corrupt left out by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_folders import save_vae
from tiny_clip import CHANNELS, write_clip
from tiny_preparations import job_of, prepare_config, prepare_here, write_digits

from dtr_ray.config import DataConfig
from dtr_ray.data import load_images
from dtr_ray.data.decoding import decode
from dtr_ray.data.manifest import read_texts
from dtr_ray.preparation.job import TooManyCorruptError
from dtr_ray.preparation.models import Models
from dtr_ray.preparation.shard import make_shard


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """40 digits with captions."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 40, captions=True)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


def test_images_labels_and_order_are_the_sources(digits: Path, tmp_path: Path) -> None:
    config = prepare_config(digits, tmp_path, shard_images=16)
    manifest = prepare_here(config)
    data = load_images(config.data(str(tmp_path / "tiny"), 10), tmp_path)
    paths = sorted(digits.rglob("*.png"))
    expected = np.stack([decode(path, 16, "x") for path in paths])
    np.testing.assert_array_equal(data.pixels(torch.arange(40)).numpy(), expected)
    assert data.labels.tolist() == [int(path.parent.name) for path in paths]
    assert [shard.num_images for shard in manifest.shards] == [16, 16, 8]
    assert manifest.class_counts == np.bincount(data.labels.numpy(), minlength=10).tolist()
    assert manifest.class_names == [str(digit) for digit in range(10)]


def test_without_classes_all_labels_are_0(digits: Path, tmp_path: Path) -> None:
    manifest = prepare_here(prepare_config(digits, tmp_path, num_classes=1))
    assert (manifest.num_classes, manifest.class_counts, manifest.class_names) == (1, [40], [])


def test_corrupt_images_are_left_out_by_name(tmp_path: Path) -> None:
    corrupt = write_digits(tmp_path / "digits", 60, num_corrupt=7)
    manifest = prepare_here(prepare_config(tmp_path / "digits", tmp_path, shard_images=16))
    assert manifest.num_images == 60
    assert sorted(image.name for image in manifest.skipped) == corrupt
    assert all("cannot be read as an image" in image.reason for image in manifest.skipped)


def test_a_shard_of_corrupt_images_alone_leaves_no_file(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 60)
    for path in sorted((tmp_path / "digits").rglob("*.png"))[20:40]:
        path.write_bytes(b"")
    manifest = prepare_here(prepare_config(tmp_path / "digits", tmp_path, shard_images=20))
    assert [shard.pixels for shard in manifest.shards] == ["pixels/00000.npy", "pixels/00002.npy"]
    assert manifest.num_images == 40


def test_too_many_corrupt_images_stop_a_shard_with_the_list(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 30, num_corrupt=5)
    config = prepare_config(tmp_path / "digits", tmp_path, max_corrupt=3)
    job = job_of(config)
    job.begin()
    with pytest.raises(
        TooManyCorruptError, match=r"images cannot be read, more than max_corrupt 3"
    ) as caught:
        make_shard(job, Models.load(config, "cpu"), 0)
    assert len(str(caught.value).splitlines()) == len(caught.value.skipped) + 1 >= 5
    assert list(job.folder.rglob("*.npy*")) == []


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_are_the_posterior_that_diffusers_gives(
    digits: Path, vae: Path, tmp_path: Path, flip: bool, dtype: str
) -> None:
    from diffusers import AutoencoderKL

    manifest = prepare_here(
        prepare_config(
            digits, tmp_path, resolution=32, vae=str(vae), flip=flip, latent_dtype=dtype, keep_pixels=True
        )
    )
    assert manifest.vae is not None
    latents = np.load(tmp_path / "tiny/latents/00000.npy")
    pixels = np.load(tmp_path / "tiny/pixels/00000.npy")
    assert (latents.shape, latents.dtype) == ((40, 2 if flip else 1, 2, 4, 4, 4), dtype)
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    model = AutoencoderKL.from_pretrained(vae)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-3, "atol": 1e-3}
    with torch.no_grad():
        for side, images in zip(range(latents.shape[1]), (x, x.flip(-1)), strict=False):
            posterior = model.encode(images).latent_dist
            for found, expected in zip(
                latents[:, side].swapaxes(0, 1), (posterior.mean, posterior.std), strict=True
            ):
                torch.testing.assert_close(torch.from_numpy(found).float(), expected, **tolerance)


def test_latents_are_those_of_a_trial_that_encodes_for_itself(
    digits: Path, vae: Path, tmp_path: Path
) -> None:
    config = prepare_config(digits, tmp_path, resolution=32, vae=str(vae))
    manifest = prepare_here(config)
    assert not manifest.has_pixels
    ours = load_images(config.data(str(tmp_path / "tiny"), 10), tmp_path)
    alone = load_images(
        DataConfig(name="folder", path=str(digits), resolution=32, num_classes=10, vae=str(vae)), tmp_path
    )
    indices, flip = torch.arange(40), torch.arange(40) % 2 == 1
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    one, two = (data.batch(indices, flip, g) for data, g in zip((ours, alone), generators, strict=True))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert ours.labels.tolist() == alone.labels.tolist()


def test_captions_and_tokens_are_those_of_a_trial_that_encodes_for_itself(
    digits: Path, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip")
    config = prepare_config(digits, tmp_path, text_encoder=str(clip), text_channels=CHANNELS)
    manifest = prepare_here(config)
    assert manifest.text_encoder is not None
    assert (manifest.num_classes, manifest.text_encoder.num_captions) == (1, 21)
    assert read_texts(tmp_path / "tiny")[0] == ["a handwritten 0", "the digit 0"]
    section = config.data(str(tmp_path / "tiny"), 1)
    ours = load_images(section, tmp_path).captions
    alone = load_images(section.model_copy(update={"name": "folder", "path": str(digits)}), tmp_path).captions
    assert ours is not None
    assert alone is not None
    numbers = torch.arange(21)
    assert ours.texts(numbers) == alone.texts(numbers)
    torch.testing.assert_close(ours.tokens(numbers), alone.tokens(numbers), rtol=0, atol=2e-3)
    samples = torch.arange(40)
    assert torch.equal(ours.of_samples(samples), alone.of_samples(samples))


def test_latents_that_are_not_finite_are_refused(digits: Path, vae: Path, tmp_path: Path) -> None:
    job = job_of(prepare_config(digits, tmp_path, resolution=32, vae=str(vae), latent_dtype="float16"))
    job.begin()
    models = Models.load(job.config, "cpu")
    with torch.no_grad():
        models.vae.quant_conv.weight.mul_(1e8)
    with pytest.raises(ValueError, match="makes latents that are not finite in float16"):
        make_shard(job, models, 0)
    assert list(job.folder.rglob("*.npy*")) == []
