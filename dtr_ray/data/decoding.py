"""Decoding: from a file, its bytes or a Pillow image to a square of RGB pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def decode(data: bytes | Path | Image.Image, resolution: int, name: str) -> np.ndarray:
    """An image as uint8 (3, resolution, resolution): RGB, without its alpha, its EXIF rotation ignored.

    Args:
        data: a file, the bytes of one, or an image.
        resolution: height and width; the centre square is taken, see `centre_crop`.
        name: what the message calls it.

    Raises:
        ValueError: it cannot be decoded whole, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    try:
        if isinstance(data, Image.Image):
            image = _decoded(data, resolution)
        else:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
                image = _decoded(file, resolution)
    except UnidentifiedImageError as error:
        # Pillow names the object in memory here, which is another one each time.
        raise ValueError(f"{name} cannot be read as an image: Pillow does not know its format") from error
    # Decoders raise anything from SyntaxError to struct.error on a broken file.
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return np.asarray(image).transpose(2, 0, 1)


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


def _decoded(image: Image.Image, resolution: int) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow only warns up to twice this many.
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
    return centre_crop(_to_rgb(image), resolution)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grays at 255.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
