"""finish: from the shards of a job to a complete folder: labels, captions, references, manifest."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtr_ray.data.manifest import (
    CAPTIONS,
    LABELS,
    MANIFEST,
    TOKENS,
    FileEntry,
    Manifest,
    ReferenceEntry,
    ShardEntry,
    SkippedImage,
    SourceEntry,
    TextEntry,
    VaeEntry,
    caption_names,
)
from dtr_ray.data.rows import Rows
from dtr_ray.evaluation.references import kept_images, write_statistics
from dtr_ray.preparation.files import (
    ArrayFile,
    entry_of,
    full_disk,
    partial_name,
    whole_file,
    write_json,
)
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.models import read_digests
from dtr_ray.preparation.shard import FEATURE_BATCH

_CHUNK = 1000


@dataclass
class Gathered:
    """What the reports of all shards say together."""

    labels: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    shards: list[ShardEntry] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Of the shards that hold images."""
    skipped: list[SkippedImage] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    num_enlarged: int = 0
    identity: str = ""


def gather(job: Job) -> Gathered:
    """Reads the reports of a job whose shards are all done.

    Raises:
        ValueError: fewer than 2 images could be read.
    """
    found, digest = Gathered(), hashlib.sha256()
    for report in job.reports():
        found.labels += report.labels
        found.texts += report.texts
        found.skipped += report.skipped
        found.num_enlarged += report.num_enlarged
        digest.update("".join(report.digests).encode("ascii"))
        found.files |= {name: entry for name, entry in report.files.items() if not name.startswith(".")}
        if report.labels:
            found.shards.append(report.shard)
            found.numbers.append(report.number)
    if len(found.labels) < 2:
        reasons = "".join(f"\n  {image.reason}" for image in found.skipped[:20])
        raise ValueError(f"{len(found.labels)} images could be read; 2 are the least:{reasons}")
    found.identity = f"prepared-{job.config.resolution}-{digest.hexdigest()[:16]}"
    return found


def finish(job: Job, found: Gathered) -> Manifest:
    """Writes all that is made of the shards together, last the manifest; then removes what was for the work.

    Tokens of captions are there already.

    Raises:
        DiskFullError: there is no room.
    """
    files, digests = dict(found.files), read_digests(job)
    references: dict[str, ReferenceEntry] = {}
    path = job.folder / LABELS
    with whole_file(path) as file:
        np.save(file, np.array(found.labels, dtype=np.int64))
    files[LABELS] = entry_of(path)
    if found.texts:
        write_json(job.folder / CAPTIONS, found.texts)
        files[CAPTIONS] = entry_of(job.folder / CAPTIONS)
        files[TOKENS] = entry_of(job.folder / TOKENS)
    for name in dict.fromkeys(job.config.features):
        entry = _write_references(job, name, found, digests[name])
        references[name] = entry
        for place in (entry.statistics, entry.features):
            files[place] = entry_of(job.folder / place)
    manifest = _manifest(job, found, files, references, digests)
    with full_disk(job.folder / MANIFEST):
        manifest.write(job.folder)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def _write_references(job: Job, name: str, found: Gathered, digest: str) -> ReferenceEntry:
    """Statistics of an extractor's features of all images, and the features that are kept."""
    paths = [job.features_file(name, number) for number in found.numbers]
    counts = [shard.num_images for shard in found.shards]
    width = int(np.load(paths[0], mmap_mode="r", allow_pickle=False).shape[1])
    rows = Rows(paths, counts, (width,), np.float32)
    folder, total = job.folder / "references", len(rows)
    folder.mkdir(exist_ok=True)
    statistics = folder / f"{name}.npz"
    temporary = partial_name(statistics)
    try:
        with full_disk(statistics):
            write_statistics(_batches(rows), total, temporary)
        temporary.replace(statistics)
    finally:
        temporary.unlink(missing_ok=True)
    chosen = kept_images(total).numpy()
    kept = ArrayFile(folder / f"{name}-features-{len(chosen)}.npy", (width,), np.float32)
    try:
        for start in range(0, len(chosen), _CHUNK):
            kept.append(rows.take(chosen[start : start + _CHUNK]))
        kept.close()
    finally:
        kept.discard()
    return ReferenceEntry(
        digest=digest,
        num_features=width,
        statistics=f"references/{statistics.name}",
        features=f"references/{name}-features-{len(chosen)}.npy",
        num_kept=len(chosen),
    )


def _batches(rows: Rows) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(rows), FEATURE_BATCH):
        stop = min(start + FEATURE_BATCH, len(rows))
        yield rows.take(np.arange(start, stop)).astype(np.float64)


def _manifest(
    job: Job,
    found: Gathered,
    files: dict[str, FileEntry],
    references: dict[str, ReferenceEntry],
    digests: dict[str, str],
) -> Manifest:
    config, (vae, text) = job.config, _encoders(job, found, digests)
    counts = np.bincount(found.labels, minlength=job.num_classes).tolist()
    return Manifest(
        name=config.name,
        identity=found.identity,
        resolution=config.resolution,
        num_images=len(found.labels),
        num_classes=job.num_classes,
        class_names=list(job.source.class_names) if job.num_classes > 1 else [],
        class_counts=counts,
        num_enlarged=found.num_enlarged,
        source=SourceEntry(digest=job.source.digest, num_images=len(job.source)),
        vae=vae,
        text_encoder=text,
        shards=found.shards,
        references=references,
        skipped=found.skipped,
        files=files,
        config=config.to_dict(),
    )


def _encoders(job: Job, found: Gathered, digests: dict[str, str]) -> tuple[VaeEntry | None, TextEntry | None]:
    config = job.config
    vae = text = None
    if config.vae is not None:
        vae = VaeEntry(
            name=config.vae,
            digest=digests["vae"],
            scale=config.latent_scale,
            dtype=config.latent_dtype,
            shape=list(config.data(config.output, 1).sample_shape),
            flip=config.flip,
        )
    if config.text_encoder is not None:
        text = TextEntry(
            name=config.text_encoder,
            digest=digests["text_encoder"],
            channels=config.text_channels,
            num_captions=len(caption_names(found.texts)),
        )
    return vae, text
