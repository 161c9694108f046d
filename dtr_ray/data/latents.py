"""Latents of the images under a VAE, encoded once for both orientations and shared by all processes.

Shapes: N images, B batch, C latent channels, h = w = resolution / 8. Raw latents are the VAE's own; scaled
latents, what the model sees, are raw latents times `latent_scale`.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtr_ray.cache import build_once, looks_local, write_npy
from dtr_ray.config import DataConfig
from dtr_ray.data.dataset import ImageData, quantise
from dtr_ray.data.rows import Rows
from dtr_ray.weights.finding import find_part, part_folder

# Images that pass the VAE at once: 256 x 256 pixels take about 0.3 GB each.
_CHUNK_IMAGES = 16

_log = logging.getLogger(__name__)


class LatentData(ImageData):
    """Images whose scaled latents are what the model sees.

    `pixels`, `labels` and `identity` are those of the images, so that statistics of the images are shared
    between trials in pixels and in latents.
    """

    def __init__(self, images: ImageData, latents: Rows, vae: Any, scale: float) -> None:
        """Latents (N, [plain, flipped], [mean, std], C, h, w), raw; the second orientation may be missing."""
        super().__init__(images._pixels, images.labels, images.num_classes, images.identity)
        self._latents = latents
        self._vae = vae
        self._scale = scale

    def batch(
        self, indices: Tensor, flip: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scaled latents, float32 (B, C, h, w), drawn from the VAE's posterior; its mean without a generator.

        Args:
            indices: int64 (B,).
            flip: bool (B,), which images to mirror before the VAE; default: none.
            generator: a CPU generator for the posterior's noise.
        """
        side = torch.zeros_like(indices) if flip is None else flip.long()
        posterior = torch.from_numpy(self._latents.take(indices.numpy(), side.numpy()))
        mean, std = posterior.float().unbind(1)
        if generator is None:
            return mean * self._scale
        return (mean + std * torch.randn(mean.shape, generator=generator)) * self._scale

    def to_pixels(self, x: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to uint8 pixels (B, C, H, W), on the same device."""
        return decode_latents(self._vae.to(x.device), x, self._scale, gray=self.num_channels == 1)


def decode_latents(vae: Any, x: Tensor, scale: float, *, gray: bool = False) -> Tensor:
    """Scaled latents (B, C, h, w) to uint8 pixels (B, 3, H, W), or (B, 1, H, W) with `gray`.

    Args:
        vae: on the device of `x`.
        x: the latents, float.
        scale: factor from raw to scaled latents.
        gray: average the VAE's channels to one.
    """
    with torch.no_grad():
        parts = [vae.decode(z).sample for z in torch.split(x.to(vae.dtype) / scale, _CHUNK_IMAGES)]
    pixels = torch.cat(parts).float()
    return quantise(pixels.mean(1, keepdim=True) if gray else pixels)


def check_vae(vae: str) -> None:
    """Raises ValueError where `vae` names a local folder that is not a VAE's; a hub id is not looked up."""
    if not looks_local(vae):
        return
    if not (part_folder(Path(vae).expanduser(), "vae") / "config.json").is_file():
        raise ValueError(f"data.vae {vae} is not a folder with an AutoencoderKL (it has no config.json)")


def load_latents(config: DataConfig, images: ImageData, cache_dir: Path) -> LatentData:
    """The images with the latents of `config.vae`, encoded where they are not cached yet.

    Raises:
        ValueError: the VAE cannot be loaded, or its latents are not of `config.sample_shape`.
    """
    vae = load_vae(config)
    path = cache_dir / f"latents-{images.identity}-{vae_digest(vae)}.npy"
    build_once(path, lambda temporary: _encode_all(images, vae, config.sample_shape, temporary))
    return LatentData(images, Rows.of_file(path), vae, config.latent_scale)


def load_vae(config: DataConfig) -> Any:
    """The VAE that `config.vae` names, float32 and frozen; raises ValueError as `load_latents`."""
    assert config.vae is not None
    folder = find_part("vae", config.vae, "vae")
    # Imported here: diffusers takes seconds, and training on pixels does not need it.
    from diffusers import AutoencoderKL

    # diffusers ships no types: its models are Any here.
    loader: Any = AutoencoderKL
    try:
        vae, report = loader.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    # Besides OSError and ValueError, broken files raise what their parsers do.
    except Exception as error:
        raise ValueError(f"data.vae {config.vae} cannot be loaded as an AutoencoderKL: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ValueError(f"data.vae {config.vae} is no AutoencoderKL: it has no weights {missing}")
    vae = vae.float().eval().requires_grad_(False)
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    found = (channels, config.resolution // factor, config.resolution // factor)
    if found != config.sample_shape:
        raise ValueError(f"data.vae {config.vae} makes latents of {found}, not {config.sample_shape}")
    return vae


def vae_digest(vae: Any) -> str:
    """16 hex digits by a VAE's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def encode_images(vae: Any, pixels: Tensor, *, flip: bool = True) -> Tensor:
    """The VAE's posterior of images: float32 (B, [plain, flipped], [mean, std], C, h, w) on its device.

    Args:
        vae: as `load_vae` gives it.
        pixels: uint8 (B, 1 or 3, H, W); gray becomes RGB.
        flip: with the mirrored images as second orientation; else there is one alone.
    """
    x = (pixels.to(vae.device).float() / 127.5 - 1).expand(-1, vae.config.in_channels, -1, -1)
    with torch.no_grad():
        sides = [
            [vae.encode(part).latent_dist for part in torch.split(side, _CHUNK_IMAGES)]
            for side in ((x, x.flip(-1)) if flip else (x,))
        ]
    return torch.stack(
        [torch.cat([torch.stack([part.mean, part.std], 1) for part in parts]) for parts in sides], 1
    )


def _encode_all(images: ImageData, vae: Any, shape: tuple[int, int, int], path: Path) -> None:
    """Writes mean and std of both orientations, float32 (N, [plain, flipped], [mean, std], C, h, w)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _log.info("encoding the latents of %d images on %s, once", len(images), device)
    vae.to(device)

    def chunks() -> Iterator[np.ndarray]:
        for indices in torch.split(torch.arange(len(images)), _CHUNK_IMAGES):
            yield encode_images(vae, images.pixels(indices)).cpu().numpy()

    write_npy(path, (len(images), 2, 2, *shape), np.float32, chunks())
