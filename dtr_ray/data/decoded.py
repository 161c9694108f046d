"""The images of a folder, decoded once into a memory-mapped file of the cache."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dtr_ray.cache import build_once, write_npy
from dtr_ray.data.decoding import decode
from dtr_ray.data.rows import Rows
from dtr_ray.sources.folder import ImageFiles

_CHUNK_IMAGES = 512
# Part of the cache's key: to be raised when decoding changes.
_FORMAT = "1"

_log = logging.getLogger(__name__)


def decoded_images(files: ImageFiles, resolution: int, cache_dir: Path) -> Rows:
    """The images in a read-only memory map, uint8 (N, 3, resolution, resolution); decoded if not cached.

    Raises:
        ValueError: a file cannot be decoded; the message names it.
    """
    path = cache_dir / f"folder-{resolution}-{files.digest}-v{_FORMAT}.npy"
    build_once(path, lambda temporary: _decode_all(files, resolution, temporary))
    return Rows.of_file(path)


def decode_image(path: Path, resolution: int) -> np.ndarray:
    """One image file as uint8 (3, resolution, resolution), see `decode`."""
    return decode(path, resolution, str(path))


def _decode_all(files: ImageFiles, resolution: int, path: Path) -> None:
    paths = files.paths
    shape = (len(paths), 3, resolution, resolution)
    _log.info("decoding %d images of %s to %d x %d, once", shape[0], files.root, resolution, resolution)
    # Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, shape[0], _CHUNK_IMAGES):
                part = paths[start : start + _CHUNK_IMAGES]
                yield np.stack(list(pool.map(lambda file: decode_image(file, resolution), part)))

        write_npy(path, shape, np.uint8, chunks())
