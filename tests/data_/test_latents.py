"""Latents of a tiny VAE with random weights: encoded once, drawn as the posterior says, decoded."""

from pathlib import Path

import pytest
import torch

from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.data.latents import LatentData


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers AutoencoderKL of four levels, 8 x 8 pixels to a latent, saved as safetensors."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def _config(vae: Path | str, **changes: object) -> DataConfig:
    return DataConfig.from_dict(
        {"name": "digits", "resolution": 32, "vae": str(vae), "latent_scale": 0.5, **changes}
    )


@pytest.fixture(scope="module")
def latents(vae_folder: Path, shared_cache: Path) -> ImageData:
    return load_images(_config(vae_folder), shared_cache)


def test_latents_have_the_shape_that_the_configuration_promises(latents: ImageData, vae_folder: Path) -> None:
    x = latents.batch(torch.tensor([0, 5, 1796]))
    assert (tuple(x.shape[1:]), x.dtype) == (_config(vae_folder).sample_shape, torch.float32)
    assert latents.pixels(torch.tensor([0])).shape == (1, 1, 32, 32)


def test_the_mean_is_what_the_vae_encodes_in_both_orientations(latents: ImageData, vae_folder: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    indices = torch.tensor([3, 900])
    pixels = (latents.pixels(indices).float() / 127.5 - 1).expand(-1, 3, -1, -1)
    pixels = torch.stack([pixels[0], pixels[1].flip(-1)])
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    flip = torch.tensor([False, True])
    torch.testing.assert_close(latents.batch(indices, flip), expected.mean * 0.5, rtol=1e-4, atol=1e-5)
    noise = torch.randn(expected.mean.shape, generator=torch.Generator().manual_seed(7))
    drawn = latents.batch(indices, flip, torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (expected.mean + expected.std * noise) * 0.5, rtol=1e-4, atol=1e-5)


def test_decoding_goes_through_the_vae_and_keeps_the_images_channels(
    latents: ImageData, vae_folder: Path
) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    x = latents.batch(torch.arange(20))
    pixels = latents.to_pixels(x)
    assert (pixels.shape, pixels.dtype) == ((20, 1, 32, 32), torch.uint8)
    with torch.no_grad():
        decoded = vae.decode(x[-1:] / 0.5).sample.mean(1).clamp(-1, 1)
    assert (pixels[-1].float() - (decoded + 1) * 127.5).abs().max() <= 0.51


def test_latents_are_encoded_once_and_read_from_a_memory_map(
    latents: ImageData, vae_folder: Path, shared_cache: Path
) -> None:
    files = list(shared_cache.glob("latents-*.npy"))
    written = [f.stat().st_mtime_ns for f in files]
    again = load_images(_config(vae_folder), shared_cache)
    assert isinstance(again, LatentData)
    assert again._latents.is_mapped
    assert [f.stat().st_mtime_ns for f in shared_cache.glob("latents-*.npy")] == written
    assert len(files) == 1


def test_the_identity_is_that_of_the_images(latents: ImageData, shared_cache: Path) -> None:
    assert latents.identity == load_images(DataConfig(name="digits", resolution=32), shared_cache).identity


def test_a_vae_of_another_size_is_refused(tmp_path: Path, shared_cache: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"makes latents of \(4, 32, 32\), not \(4, 4, 4\)"):
        load_images(_config(tmp_path), shared_cache)


def test_a_vae_that_cannot_be_had_is_named(shared_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.vae nobody/no-such-vae: the VAE .* is not here"):
        load_images(_config("nobody/no-such-vae"), shared_cache)
