"""What `python -m dtr_ray.prepare` made, as trials read it: shards mapped into memory, nothing decoded.

Shapes: N images, C channels, H = W = resolution; h, w of a latent.
"""

import socket
from pathlib import Path

import numpy as np
import torch

from dtr_ray.config import DataConfig
from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.data.arrays import load_array
from dtr_ray.data.captions import Captions, sample_images
from dtr_ray.data.dataset import ImageData, References
from dtr_ray.data.latents import LatentData, load_vae, vae_digest
from dtr_ray.data.manifest import LABELS, TOKENS, Manifest, caption_names, read_texts
from dtr_ray.data.rows import Rows, read_header

_SHOWN_FILES = 3


def check_prepared(config: DataConfig) -> Manifest:
    """Quickly checks a prepared folder, and that it is what the configuration says; opens no shard.

    Raises:
        ValueError: it is no complete prepared folder, some value of `config` is unlike its manifest's, or a
            file is missing or not of its size.
    """
    folder = _folder(config)
    if not folder.exists():
        raise ValueError(f"data.path {folder} does not exist on {socket.gethostname()}")
    manifest = Manifest.read(folder)
    manifest.check(config)
    if manifest.vae is not None and tuple(manifest.vae.shape) != config.sample_shape:
        raise ValueError(
            f"{folder} holds latents of {tuple(manifest.vae.shape)}, not {config.sample_shape} "
            f"(channels, height, width)"
        )
    faults = manifest.missing_files(folder)
    if faults:
        more = len(faults) - _SHOWN_FILES
        listed = ", ".join(faults[:_SHOWN_FILES]) + (f", and {more} more" if more > 0 else "")
        raise ValueError(
            f"the prepared folder {folder} is damaged: {listed}. Copy it again from where it is whole; "
            f"python -m dtr_ray.prepare DATA.yaml --verify checks all of it"
        )
    return manifest


def load_prepared(config: DataConfig) -> ImageData:
    """The images or latents of a prepared folder, with their captions and references.

    Raises:
        ValueError: as `check_prepared`; or the VAE cannot be loaded, or is not the one of the latents.
    """
    manifest, folder = check_prepared(config), _folder(config)
    counts = [shard.num_images for shard in manifest.shards]
    files = [shard.pixels for shard in manifest.shards]
    pixels = None
    if manifest.has_pixels:
        shape = (3, manifest.resolution, manifest.resolution)
        pixels = Rows([folder / str(file) for file in files], counts, shape, np.uint8)
    labels = torch.from_numpy(_labels(folder / LABELS, manifest))
    data = ImageData(pixels, labels, manifest.num_classes, manifest.identity)
    if manifest.vae is not None:
        data = _latents(config, manifest, data, counts)
    if manifest.text_encoder is not None:
        texts = read_texts(folder)
        shape = (manifest.text_encoder.num_captions, TEXT_TOKENS, manifest.text_encoder.channels)
        if read_header(folder / TOKENS)[0] != shape:
            raise ValueError(f"{folder / TOKENS} is not of {shape}, as its manifest says")
        data.captions = Captions(texts, Rows.of_file(folder / TOKENS), caption_names(texts))
    data.references = {
        name: References(folder / entry.statistics, folder / entry.features)
        for name, entry in manifest.references.items()
    }
    return data


def prepared_captions(config: DataConfig, num_samples: int) -> list[str]:
    """Captions of the first samples that evaluation draws, in words.

    Raises:
        ValueError: the folder is not as `check_prepared` wants it.
    """
    check_prepared(config)
    texts = read_texts(_folder(config))
    return [texts[i][0] for i in sample_images(torch.arange(num_samples), len(texts)).tolist()]


def _latents(config: DataConfig, manifest: Manifest, images: ImageData, counts: list[int]) -> LatentData:
    entry, folder = manifest.vae, _folder(config)
    assert entry is not None
    vae = load_vae(config)
    if vae_digest(vae) != entry.digest:
        raise ValueError(
            f"data.vae {config.vae} has other weights than the VAE that made the latents in {folder}: "
            f"it would decode them wrongly"
        )
    files = [folder / str(shard.latents) for shard in manifest.shards]
    shape = (2 if entry.flip else 1, 2, *entry.shape)
    return LatentData(images, Rows(files, counts, shape, entry.dtype), vae, config.latent_scale)


def _labels(path: Path, manifest: Manifest) -> np.ndarray:
    """int64 (N,), as the manifest wants them."""
    labels = load_array(path)
    if labels.dtype != np.int64 or labels.shape != (manifest.num_images,):
        given = f"{len(labels)} labels" if labels.ndim == 1 else f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path} has {given} for {manifest.num_images} images: it must be int64 (images,)")
    if labels.size and not 0 <= labels.min() <= labels.max() < manifest.num_classes:
        raise ValueError(f"{path} has labels beyond the {manifest.num_classes} classes")
    return labels


def _folder(config: DataConfig) -> Path:
    assert config.path is not None
    return Path(config.path).expanduser()
