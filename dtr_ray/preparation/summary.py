"""What is said of a prepared folder: its content in words, and the `data` section of its trials. No torch."""

from pathlib import Path
from typing import Any

import yaml

from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.data.manifest import Manifest

_SHOWN_IMAGES = 20


def content_text(manifest: Manifest) -> str:
    """`5,000 images of 10 classes, 32 x 32`."""
    text = f"{manifest.num_images:,} images"
    if manifest.text_encoder is not None:
        text += f" with {manifest.text_encoder.num_captions - 1:,} different captions"
    elif manifest.num_classes > 1:
        text += f" of {manifest.num_classes:,} classes"
    return f"{text}, {manifest.resolution} x {manifest.resolution}"


def skipped_lines(manifest: Manifest) -> list[str]:
    """The images that are not there, each with the reason; many are cut short."""
    skipped = manifest.skipped
    if not skipped:
        return []
    lines = [f"{len(skipped):,} images cannot be read and are left out:"]
    lines += [f"  {image.reason}" for image in skipped[:_SHOWN_IMAGES]]
    if len(skipped) > _SHOWN_IMAGES:
        lines.append(f"  and {len(skipped) - _SHOWN_IMAGES:,} more, see `skipped` in manifest.json")
    return lines


def data_section(manifest: Manifest, folder: Path) -> str:
    """The `data` section, as YAML, of trials that use the prepared folder."""
    config = PrepareConfig.from_dict(manifest.config)
    values: dict[str, Any] = config.data(str(folder), manifest.num_classes).to_dict()
    unused = {key for key, value in values.items() if value is None}
    if manifest.vae is None:
        unused.add("latent_scale")
    if manifest.text_encoder is None:
        unused.add("text_channels")
    kept = {key: value for key, value in values.items() if key not in unused}
    return yaml.safe_dump({"data": kept}, sort_keys=False, allow_unicode=True).rstrip()
