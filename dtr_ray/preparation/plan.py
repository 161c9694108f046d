"""The plan of a preparation in words."""

from collections.abc import Iterator

from dtr_ray.preparation.estimate import Estimate, Probe, size_text
from dtr_ray.preparation.job import Job


def plan_text(job: Job, probed: Probe, found: Estimate, workers: str) -> str:
    """What will be done, by how many, how long it takes and how much room; one fact a line."""
    return "\n".join(f"{name:<9}{text}" for name, text in _lines(job, probed, found, workers))


def _lines(job: Job, probed: Probe, found: Estimate, workers: str) -> Iterator[tuple[str, str]]:
    config, total = job.config, len(job.source)
    classes = f", {job.num_classes:,} classes" if job.num_classes > 1 else ""
    size = f"{config.resolution} x {config.resolution}"
    yield "prepare", f"{config.name}: {total:,} images of source {config.source.type}, {size}{classes}"
    yield "into", str(job.folder)
    yield "keeps", "; ".join(_kept(job, probed))
    done = total - found.num_images
    before = f", {done:,} images done before" if done else ""
    yield "shards", f"{job.num_shards:,} of at most {config.shard_images:,} images{before}"
    yield "workers", workers
    pace = f"{duration_text(probed.image_s)} an image, measured on {probed.num_images}"
    if probed.caption_s:
        pace += f"; {duration_text(probed.caption_s)} a caption"
    yield "time", f"about {duration_text(found.seconds)} ({pace})"
    yield (
        "disk",
        (
            f"{size_text(found.need.kept)} in the end, {size_text(found.need.working)} more meanwhile; "
            f"{size_text(found.to_write)} to come, {size_text(found.free)} free"
        ),
    )


def _kept(job: Job, probed: Probe) -> Iterator[str]:
    config = job.config
    if config.keeps_pixels:
        yield "pixels"
    if config.vae is not None:
        sides = "both orientations" if config.flip else "one orientation"
        yield f"latents of {config.vae}, {sides}, {config.latent_dtype}"
    if config.text_encoder is not None:
        count = round(len(job.source) * probed.captions_per_image)
        yield f"tokens of at most {count:,} captions by {config.text_encoder}"
    if config.features:
        yield f"reference statistics of {', '.join(dict.fromkeys(config.features))}"


def duration_text(seconds: float) -> str:
    """`3.2 ms`, `12 s`, `5 min`, `2.1 h`, `3.5 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size or (unit == "s" and seconds >= 1):
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds * 1000:.2g}'):g} ms"
