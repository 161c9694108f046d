"""An image folder of one's own: listed, checked, and decoded once into a memory-mapped file.

With classes, each subfolder is a class, in the order of their names, as in torchvision's ImageFolder;
without, every image below the folder counts, at any depth. Hidden files and folders are passed over.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dtr_ray.data.cache import build_once, write_npy

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_CHUNK_IMAGES = 512
# Part of the cache's key: to be raised when decoding changes.
_FORMAT = "1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder: their paths, class of each, and a hash of names, sizes and times."""

    root: Path
    paths: list[Path]
    labels: list[int]
    digest: str


def check_folder(path: str, num_classes: int) -> None:
    """A quick look that decodes nothing: raises ValueError where the folder cannot be what is asked for."""
    root = Path(path).expanduser()
    for folder in _class_folders(root, num_classes):
        if next(walk_images(folder), None) is None:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"no image in {folder} (looked for {suffixes}, at any depth)")


def list_images(path: str, num_classes: int) -> ImageFiles:
    """All images of the folder with their classes, sorted by class and path.

    Raises:
        ValueError: the path is missing or no folder, holds no image, or its subfolders are not
            `num_classes` in number.
    """
    check_folder(path, num_classes)
    root = Path(path).expanduser()
    paths: list[Path] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, folder in enumerate(_class_folders(root, num_classes)):
        for file in sorted(walk_images(folder)):
            status = _status(file)
            entry = f"{file.relative_to(root).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(entry.encode("utf-8", "surrogateescape"))
            paths.append(file)
            labels.append(label)
    return ImageFiles(root, paths, labels, digest.hexdigest()[:16])


def decoded_images(files: ImageFiles, resolution: int, cache_dir: Path) -> np.ndarray:
    """The images as a read-only memory map, uint8 (N, 3, resolution, resolution); decoded if not cached.

    Raises:
        ValueError: a file cannot be decoded; the message names it.
    """
    path = cache_dir / f"folder-{resolution}-{files.digest}-v{_FORMAT}.npy"
    build_once(path, lambda temporary: _decode_all(files, resolution, temporary))
    images: np.ndarray = np.load(path, mmap_mode="r")
    return images


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Scales the shorter side to `resolution` and crops the centre square, as ADM prepares ImageNet.

    Halving by box averaging while twice too large, then one bicubic step (Dhariwal and Nichol, 2021).
    """
    while min(image.size) >= 2 * resolution:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def decode_image(path: Path, resolution: int) -> np.ndarray:
    """One image as uint8 (3, resolution, resolution): RGB, without its alpha, its EXIF rotation ignored."""
    try:
        with Image.open(path) as file:
            image = centre_crop(_to_rgb(file), resolution)
    # Decoders raise anything from SyntaxError to struct.error on a broken file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grays at 255.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _decode_all(files: ImageFiles, resolution: int, path: Path) -> None:
    shape = (len(files.paths), 3, resolution, resolution)
    _log.info("decoding %d images of %s to %d x %d, once", shape[0], files.root, resolution, resolution)
    # Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, shape[0], _CHUNK_IMAGES):
                part = files.paths[start : start + _CHUNK_IMAGES]
                yield np.stack(list(pool.map(lambda file: decode_image(file, resolution), part)))

        write_npy(path, shape, np.uint8, chunks())


def _class_folders(root: Path, num_classes: int) -> list[Path]:
    if not root.exists():
        raise ValueError(f"data.path {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"data.path {root} is not a folder")
    if num_classes == 1:
        return [root]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) != num_classes:
        raise ValueError(f"data.num_classes is {num_classes}, but {root} has {len(folders)} class folders")
    return folders


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _refuse(error: OSError) -> None:
    # os.walk would leave out a folder that it may not read.
    raise ValueError(f"{error.filename} cannot be read: {error}") from error


def walk_images(folder: Path) -> Iterator[Path]:
    """Paths of the images below a folder, links followed, each folder visited once."""
    seen: set[tuple[int, int]] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        status = _status(Path(where))
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(where, name)
