"""Captions in text files beside the images that they are of: `NAME.txt`, one a line. Needs no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dtr_ray.sources.folder import walk_images


def caption_file(image: Path) -> Path:
    """Where the captions of an image lie: beside it, one a line."""
    return image.with_suffix(".txt")


def check_caption_files(path: str) -> None:
    """Raises ValueError where some image below a folder has no caption file; opens none."""
    check_captions(walk_images(Path(path).expanduser()))


def check_captions(images: Iterable[Path]) -> None:
    """Raises ValueError where one of the images has no caption file; opens none."""
    for image in images:
        if not caption_file(image).is_file():
            raise _missing(image)


def read_captions(images: Sequence[Path]) -> list[list[str]]:
    """Captions of image files: the lines of `NAME.txt` beside each, blank ones left out.

    Raises:
        ValueError: a file is missing, not UTF-8, or holds no caption.
    """
    return [_read(image) for image in images]


def caption_lines(data: bytes, name: str) -> list[str]:
    """The captions in a caption file's bytes: its lines, blank ones left out.

    Raises:
        ValueError: it is not UTF-8, or holds no caption; the message calls it `name`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the captions {name} cannot be read: {error}") from error
    # Split at line ends alone: str.splitlines() also splits at characters within a caption.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"the captions {name} are empty: write one a line")
    return found


def _read(image: Path) -> list[str]:
    path = caption_file(image)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _missing(image) from None
    except OSError as error:
        raise ValueError(f"the captions {path} cannot be read: {error}") from error
    return caption_lines(data, str(path))


def _missing(image: Path) -> ValueError:
    return ValueError(f"{image} has no captions: {caption_file(image)} is missing")
