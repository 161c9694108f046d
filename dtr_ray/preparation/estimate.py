"""What a preparation will take: time by a probe of a few images, disk by the sizes of what is written."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.data.latents import encode_images
from dtr_ray.data.manifest import SkippedImage
from dtr_ray.evaluation.features import EfficientNetLite0, Inception
from dtr_ray.evaluation.references import MAX_FEATURES
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.models import Models
from dtr_ray.preparation.shard import Picture, read_picture

_ENOUGH_S = 1.5
_MAX_PROBED = 256
_NUM_FEATURES = {kind.name: kind.num_features for kind in (Inception, EfficientNetLite0)}
# Of what an image adds to a shard's report, and a shard to the manifest.
_REPORT_BYTES, _MANIFEST_BYTES = 40, 400


@dataclass(frozen=True)
class Probe:
    """What a few images took one worker."""

    num_images: int
    """That were looked at."""
    image_s: float
    """Seconds an image."""
    captions_per_image: float = 0.0
    caption_s: float = 0.0
    """Seconds a caption."""
    caption_bytes: float = 0.0
    """Length of a caption."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes."""

    kept: int
    """Of the folder when it is complete."""
    working: int
    """Beside them until then."""


@dataclass(frozen=True)
class Estimate:
    """What is still to be done, and what it takes."""

    num_images: int
    """Whose shards are not done."""
    seconds: float
    need: DiskNeed
    written: int
    """Bytes that are there already."""
    free: int
    """Bytes on the disk."""

    @property
    def to_write(self) -> int:
        """Bytes that are still to come, at the moment when there are most."""
        return max(0, self.need.kept + self.need.working - self.written)

    def check(self, folder: Path) -> None:
        """Raises ValueError where the disk has not enough room."""
        if self.to_write > self.free:
            raise ValueError(
                f"{folder} needs {size_text(self.to_write)} more, but its disk has {size_text(self.free)} "
                "free: choose another with --output, make room, or keep less (latent_dtype: float16, "
                "flip: false, keep_pixels: false)"
            )


def probe(job: Job, models: Models, num_threads: int = 1) -> Probe:
    """Takes a few images, from all over the source, through all that a shard's images go through.

    More and more of them, until that takes long enough to be measured; the first rounds warm up.
    """
    count, rounds = 1, 0
    while True:
        count = min(count, len(job.source))
        pictures, seconds = _timed_round(job, models, count, num_threads)
        rounds += 1
        if count in (_MAX_PROBED, len(job.source)) and rounds > 1:
            break
        if seconds >= _ENOUGH_S and rounds > 1:
            break
        # Not more than about four times the time that is enough.
        faster = int(count * _ENOUGH_S * 2 / max(seconds, 1e-9))
        count = min(max(count, min(count * 4, faster)), _MAX_PROBED)
    if not pictures and count in (_MAX_PROBED, len(job.source)):
        first = read_picture(job, 0)
        assert isinstance(first, SkippedImage)
        where = job.config.source.path
        raise ValueError(f"{where}: not one of {count} images can be read; the first: {first.reason}")
    texts = [text for picture in pictures for text in picture.texts]
    if models.text_encoder is None or not texts:
        return Probe(count, seconds / count)
    some = texts[:8]
    encode = models.text_encoder.encode
    _timed(lambda: encode(some).cpu())
    caption_s = _timed(lambda: encode(some).cpu()) / len(some)
    length = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / len(texts)
    return Probe(count, seconds / count, len(texts) / len(pictures), caption_s, length)


def _timed_round(job: Job, models: Models, count: int, num_threads: int) -> tuple[list[Picture], float]:
    indices = np.linspace(0, len(job.source) - 1, count).astype(int).tolist()
    with ThreadPoolExecutor(num_threads) as pool:
        started = time.perf_counter()
        found = list(pool.map(lambda index: read_picture(job, index), indices))
        reading_s = time.perf_counter() - started
    pictures = [picture for picture in found if not isinstance(picture, SkippedImage)]
    if not pictures:
        return [], reading_s
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))

    def encode() -> None:
        if models.vae is not None:
            encode_images(models.vae, pixels, flip=job.config.flip).cpu()
        for extractor in models.extractors:
            extractor(pixels).cpu()

    encoding_s = _timed(encode)
    # Beside a GPU that encodes, the next images are read.
    together = max(reading_s, encoding_s) if models.device.type == "cuda" else reading_s + encoding_s
    return pictures, together


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def disk_need(config: PrepareConfig, num_images: int, probed: Probe) -> DiskNeed:
    """Bytes of the prepared folder and of what is beside it meanwhile; captions count as all different."""
    shards = -(-num_images // config.shard_images)
    kept = 8 * num_images + _MANIFEST_BYTES * (shards + 4)
    if config.keeps_pixels:
        kept += num_images * 3 * config.resolution**2
    if config.vae is not None:
        numbers = (2 if config.flip else 1) * 2 * int(np.prod(config.data(config.output, 1).sample_shape))
        kept += num_images * numbers * np.dtype(config.latent_dtype).itemsize
    working = _REPORT_BYTES * num_images
    for name in dict.fromkeys(config.features):
        size = _NUM_FEATURES[name]
        rank = max(1, min(size, num_images - 1))
        kept += 8 * size * (1 + size + rank) + 4 * size * min(num_images, MAX_FEATURES)
        working += 4 * size * num_images
    if config.text_encoder is not None:
        captions = round(num_images * probed.captions_per_image)
        text = round(captions * (probed.caption_bytes + 4)) + 2 * num_images
        kept += (captions + 1) * TEXT_TOKENS * config.text_channels * 2 + text
        working += text
    return DiskNeed(kept, working)


def estimate(job: Job, probed: Probe, done_images: int, num_workers: int) -> Estimate:
    """What the rest of a job takes `num_workers` workers, each as fast as the one that was probed."""
    left = len(job.source) - done_images
    workers = max(1, min(num_workers, -(-left // job.config.shard_images)))
    seconds = left * probed.image_s / workers
    seconds += len(job.source) * probed.captions_per_image * probed.caption_s / num_workers
    files = [path for path in job.folder.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    need = disk_need(job.config, len(job.source), probed)
    return Estimate(left, seconds, need, written, shutil.disk_usage(_existing(job.folder)).free)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def size_text(num_bytes: float) -> str:
    """Bytes as `84.0 GB`, decimal."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
