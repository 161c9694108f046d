"""make_shard: the images of one shard decoded, checked, encoded and written, with a report of it.

n images of the shard that can be read; B of them at a time; D features.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from dtr_ray.config.errors import one_line
from dtr_ray.data.decoding import decode
from dtr_ray.data.latents import encode_images
from dtr_ray.data.manifest import FileEntry, ShardEntry, SkippedImage
from dtr_ray.preparation.files import ArrayFile, write_json
from dtr_ray.preparation.job import Job, ShardReport, TooManyCorruptError
from dtr_ray.preparation.models import Models

FEATURE_BATCH = 250
"""Images that an extractor sees at once, as in `reference_features`: another number moves its last digits."""
_BATCH_IMAGES = 32


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    pixels: np.ndarray
    """uint8 (3, H, W)."""
    label: int
    texts: tuple[str, ...]
    is_enlarged: bool


def read_picture(job: Job, index: int) -> Picture | SkippedImage:
    """An image of the source, decoded and cropped; or why it cannot be.

    Raises:
        ValueError: captions are asked for, and it has none.
    """
    name, resolution = job.source.names[index], job.config.resolution
    try:
        item = job.source.read(index)
        pixels = decode(item.data, resolution, name)
        width, height = _size(item.data)
    except ValueError as error:
        return SkippedImage(name=one_line(name), reason=one_line(str(error)))
    if job.config.text_encoder is not None and not item.captions:
        raise ValueError(f"{one_line(name)} has no caption")
    label = item.label if job.num_classes > 1 else 0
    return Picture(pixels, label, item.captions, min(width, height) < resolution)


def make_shard(
    job: Job, models: Models, number: int, num_threads: int = 1, tell: Callable[[int], None] | None = None
) -> ShardReport:
    """Writes a shard's files, and its report when all of them are there.

    Args:
        job: what is made.
        models: on the device of the work.
        number: of the shard.
        num_threads: that decode.
        tell: is told now and then how many of the shard's images are done.

    Raises:
        TooManyCorruptError: the shard alone has more unreadable images than the limit.
        DiskFullError: there is no room.
        ValueError: an image has no caption, or latents that are not finite.
    """
    started = time.monotonic()
    shard = _Shard(job, models, number)
    with ExitStack() as stack:
        stack.callback(shard.discard)
        for done, batch in _read_ahead(job, job.images(number), num_threads):
            shard.add(batch)
            if tell is not None:
                tell(done)
        report = shard.close(time.monotonic() - started)
    write_json(job.report_file(number), report.to_dict())
    return report


def _read_ahead(
    job: Job, indices: range, num_threads: int
) -> Iterator[tuple[int, list[Picture | SkippedImage]]]:
    """Batches of pictures, the next of which is being read while one is worked on; how many came so far."""
    batches = [indices[i : i + _BATCH_IMAGES] for i in range(0, len(indices), _BATCH_IMAGES)]
    with ThreadPoolExecutor(num_threads) as pool:

        def submit(batch: range) -> list[Future[Picture | SkippedImage]]:
            return [pool.submit(read_picture, job, index) for index in batch]

        try:
            ahead = submit(batches[0]) if batches else []
            for position in range(len(batches)):
                now = ahead
                ahead = submit(batches[position + 1]) if position + 1 < len(batches) else []
                found = [future.result() for future in now]
                yield batches[position].stop - indices.start, found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Shard:
    """A shard in the making."""

    job: Job
    models: Models
    number: int
    labels: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    num_enlarged: int = 0

    def __post_init__(self) -> None:
        config, name = self.job.config, f"{self.number:05d}.npy"
        size = config.resolution
        self._files: dict[str, ArrayFile] = {}
        if config.keeps_pixels:
            path = self.job.folder / "pixels" / name
            self._files[f"pixels/{name}"] = ArrayFile(path, (3, size, size), np.uint8)
        if self.models.vae is not None:
            sides = 2 if config.flip else 1
            shape = (sides, 2, *config.data(config.output, 1).sample_shape)
            path = self.job.folder / "latents" / name
            self._files[f"latents/{name}"] = ArrayFile(path, shape, np.dtype(config.latent_dtype))
        self._features = {
            extractor.name: ArrayFile(
                self.job.features_file(extractor.name, self.number), (extractor.num_features,), np.float32
            )
            for extractor in self.models.extractors
        }
        self._waiting: list[np.ndarray] = []

    def add(self, batch: list[Picture | SkippedImage]) -> None:
        """Writes a batch's images."""
        pictures = []
        for found in batch:
            if isinstance(found, SkippedImage):
                self.skipped.append(found)
            else:
                pictures.append(found)
        limit = self.job.config.max_corrupt
        if len(self.skipped) > limit:
            raise TooManyCorruptError(self.skipped, limit)
        if not pictures:
            return
        for picture in pictures:
            self.labels.append(picture.label)
            self.num_enlarged += picture.is_enlarged
            self.digests.append(hashlib.blake2b(picture.pixels.tobytes(), digest_size=16).hexdigest())
            if self.job.config.text_encoder is not None:
                self.texts.append(list(picture.texts))
        self._write(np.stack([picture.pixels for picture in pictures]))

    def _write(self, pixels: np.ndarray) -> None:
        for name, file in self._files.items():
            file.append(pixels if name.startswith("pixels/") else self._latents(pixels))
        if self._features:
            self._waiting.extend(pixels)
            while len(self._waiting) >= FEATURE_BATCH:
                self._extract(FEATURE_BATCH)

    def _latents(self, pixels: np.ndarray) -> np.ndarray:
        latents = encode_images(self.models.vae, torch.from_numpy(pixels), flip=self.job.config.flip).cpu()
        with np.errstate(over="ignore"):
            array: np.ndarray = latents.numpy().astype(self.job.config.latent_dtype)
        if not np.isfinite(array).all():
            config = self.job.config
            raise ValueError(f"vae {config.vae} makes latents that are not finite in {config.latent_dtype}")
        return array

    def _extract(self, count: int) -> None:
        """Features of the first images that wait; always of a whole batch, see FEATURE_BATCH."""
        images = self._waiting[:count]
        del self._waiting[:count]
        whole = images + images[-1:] * (FEATURE_BATCH - count)
        batch = torch.from_numpy(np.stack(whole))
        for extractor in self.models.extractors:
            self._features[extractor.name].append(extractor(batch)[:count].cpu().numpy())

    def close(self, seconds: float) -> ShardReport:
        """Gives the files their names; returns what is in them."""
        if self._waiting:
            self._extract(len(self._waiting))
        files: dict[str, FileEntry] = {}
        for name, file in self._files.items():
            entry = file.close()
            if entry is not None:
                files[name] = entry
        for extractor, file in self._features.items():
            entry = file.close()
            if entry is not None:
                path = self.job.features_file(extractor, self.number)
                files[path.relative_to(self.job.folder).as_posix()] = entry
        places = {name.split("/")[0]: name for name in files if name.split("/")[0] in ("pixels", "latents")}
        return ShardReport(
            number=self.number,
            shard=ShardEntry(num_images=len(self.labels), **places),
            labels=self.labels,
            texts=self.texts,
            skipped=self.skipped,
            digests=self.digests,
            num_enlarged=self.num_enlarged,
            files=files,
            seconds=seconds,
        )

    def discard(self) -> None:
        """Removes what has not got its name."""
        for file in (*self._files.values(), *self._features.values()):
            file.discard()


def _size(data: bytes | Image.Image) -> tuple[int, int]:
    if isinstance(data, Image.Image):
        return data.size
    # Of an image that has been decoded: its header is read once more.
    with Image.open(io.BytesIO(data)) as image:
        return image.size
