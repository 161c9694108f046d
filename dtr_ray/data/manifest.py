"""Manifest: what a prepared folder holds, file by file, and what it was made with.

A prepared folder is complete where it has `manifest.json`, which is written last. N images, U captions:

    manifest.json                     this
    labels.npy                        int64 (N,)
    pixels/00000.npy, ...             uint8 (n, 3, H, W): the images of a shard, in order
    latents/00000.npy, ...            float (n, 1 or 2 orientations, [mean, std], C, h, w): unscaled
    captions.json                     the texts of each image, a list of N lists
    tokens.npy                        float16 (U, 77, D): of the empty caption, then of the texts in order
    references/EXTRACTOR.npz          statistics of the features of all images
    references/EXTRACTOR-features-COUNT.npy   float32 (COUNT, D), in random order

Needs no torch: a command that only looks whether a folder is complete answers at once.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dtr_ray.config.base import Config
from dtr_ray.config.data import DataConfig
from dtr_ray.config.errors import shown
from dtr_ray.config.files import is_inside

MANIFEST = "manifest.json"
LABELS = "labels.npy"
CAPTIONS = "captions.json"
TOKENS = "tokens.npy"
WORK = ".work"
"""Folder below a prepared one with what is needed to go on; gone when it is complete."""


def _check_inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError(f"{name!r:.80} leads out of the folder; refused")
    return name


Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, AfterValidator(_check_inside)]
"""A file of the folder, by its path from it."""


class FileEntry(Config):
    """A file of the folder."""

    sha256: str
    num_bytes: Count


class ShardEntry(Config):
    """Images that follow one another, and where they are; paths from the folder."""

    num_images: Count
    pixels: Name | None = None
    latents: Name | None = None


class VaeEntry(Config):
    """The VAE whose posterior's mean and std are kept."""

    name: str
    digest: str
    """Hash of its weights."""
    scale: float
    """Factor from raw to scaled latents; the files hold raw ones."""
    dtype: Literal["float32", "float16"]
    shape: list[int]
    """[C, h, w] of a latent."""
    flip: bool
    """Whether the mirrored images' are there too, as the second orientation."""


class TextEntry(Config):
    """The text encoder whose tokens are kept."""

    name: str
    digest: str
    """Hash of all that decides the tokens."""
    channels: int
    num_captions: int
    """Rows of the tokens: different captions, the empty one (the first) included."""


class ReferenceEntry(Config):
    """Statistics of an extractor's features of all images, and those of some; paths from the folder."""

    digest: str
    """Hash of the extractor's weights."""
    num_features: int
    statistics: Name
    features: Name
    num_kept: int
    """Images whose features are kept."""


class SkippedImage(Config):
    """An image that is not there, since it could not be read."""

    name: str
    reason: str


class SourceEntry(Config):
    """Where the images came from."""

    digest: str
    """Of names, sizes and times."""
    num_images: int
    """Skipped ones included."""


class Manifest(Config):
    """A prepared folder's content. Images are numbered through all shards, skipped ones left out."""

    format: Literal[1] = 1
    name: str
    identity: str
    """`prepared-RESOLUTION-HASH`, the hash of all pixels in order: to key caches by."""
    resolution: int
    num_images: int
    num_classes: int
    class_names: list[str]
    """By label; empty where the source has none."""
    class_counts: list[int]
    """Images of each class."""
    num_enlarged: int
    """Images that were smaller than the resolution."""
    source: SourceEntry
    vae: VaeEntry | None
    text_encoder: TextEntry | None
    shards: list[ShardEntry]
    references: dict[str, ReferenceEntry]
    """By the extractor's name."""
    skipped: list[SkippedImage]
    files: dict[Name, FileEntry]
    """Every other file of the folder, by its path from it."""
    config: dict[str, Any]
    """The PrepareConfig that it was made by."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        held = sum(shard.num_images for shard in self.shards)
        if held != self.num_images:
            raise ValueError(f"num_images is {self.num_images}, but its shards hold {held}")
        return self

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The manifest of a prepared folder.

        Raises:
            ValueError: there is none, the folder is not complete, or the file is not one of ours.
        """
        folder = Path(folder).expanduser()
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(_why_absent(folder)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            found = f"{place}: {first['msg']}" if place else first["msg"]
            raise ValueError(f"{path} is not a manifest that this version reads: {found}") from error

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, whole or not at all."""
        temporary = folder / f".{MANIFEST}.partial"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1, ensure_ascii=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)

    def check(self, data: DataConfig) -> None:
        """Raises ValueError where a `data` section says other than this folder holds; it names every key."""
        wrong = list(self._differences(data))
        if wrong:
            raise ValueError(
                f"the prepared folder {data.path} does not go with the configuration: {'; '.join(wrong)}"
            )

    def _differences(self, data: DataConfig) -> Iterator[str]:
        vae, text = self.vae, self.text_encoder
        yield from _unlike("resolution", data.resolution, self.resolution)
        yield from _unlike("vae", data.vae, None if vae is None else vae.name)
        yield from _unlike("text_encoder", data.text_encoder, None if text is None else text.name)
        if data.text_encoder is None:
            yield from _unlike("num_classes", data.classes, self.num_classes)
        if vae is not None and data.vae is not None:
            yield from _unlike("latent_scale", data.latent_scale, vae.scale)
            if data.horizontal_flip and not vae.flip:
                yield "data.horizontal_flip is true, prepared was without mirrored images (flip: false)"
        if vae is None and not self.has_pixels:
            yield "it holds neither pixels nor latents"
        if text is not None and data.text_encoder is not None:
            yield from _unlike("text_channels", data.text_channels, text.channels)

    @property
    def has_pixels(self) -> bool:
        """Whether the decoded images are kept."""
        return all(shard.pixels is not None for shard in self.shards)

    @property
    def starts(self) -> list[int]:
        """The number of each shard's first image; at the end N."""
        return [0, *accumulate(shard.num_images for shard in self.shards)]

    def missing_files(self, folder: Path) -> list[str]:
        """Files that are not there or not of their size, each with what is wrong; reads none."""
        return list(filter(None, (_size_fault(folder, name, entry) for name, entry in self.files.items())))

    def broken_files(self, folder: Path, num_threads: int = 4) -> list[str]:
        """Files whose content is not what was written, each with what is wrong; reads them all."""
        with ThreadPoolExecutor(num_threads) as pool:
            found = pool.map(lambda item: _fault(folder, *item), self.files.items())
            return list(filter(None, found))


def caption_names(texts: Sequence[Sequence[str]]) -> list[str]:
    """The different captions of images in the order of their tokens: the empty one, then by code points."""
    return ["", *sorted({text for own in texts for text in own} - {""})]


def read_texts(folder: str | Path) -> list[list[str]]:
    """The captions of each image of a prepared folder; raises ValueError where the file cannot be read."""
    path = Path(folder).expanduser() / CAPTIONS
    try:
        texts: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return texts


def _why_absent(folder: Path) -> str:
    if not folder.is_dir():
        return f"data.path {folder} is not a folder"
    if (folder / WORK).is_dir():
        return f"{folder} is not complete: python -m dtr_ray.prepare, with the same file, goes on with it"
    return f"{folder} is not a prepared folder (it has no {MANIFEST}): python -m dtr_ray.prepare makes one"


def _unlike(key: str, given: object, found: object) -> Iterator[str]:
    if given != found:
        yield f"data.{key} is {shown(given)}, prepared was {shown(found)}"


def _size_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if size == entry.num_bytes else f"{name}: {size} bytes, not {entry.num_bytes}"


def _fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    fault = _size_fault(folder, name, entry)
    if fault is not None:
        return fault
    try:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if found == entry.sha256 else f"{name}: its content has changed (SHA-256 {found[:16]}...)"
