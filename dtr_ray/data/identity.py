"""What tells one data set from another, found out without decoding an image."""

from pathlib import Path

from dtr_ray.config import DataConfig
from dtr_ray.data.images import load_images
from dtr_ray.data.prepared import check_prepared
from dtr_ray.sources.folder import list_images


def data_identity(config: DataConfig, cache_dir: Path) -> str:
    """The `identity` of what `load_images` gives; the same for latents, which are those of these images.

    Raises:
        ValueError: the data is not there, as `check_data` tells it.
    """
    if config.name == "folder":
        assert config.path is not None
        return f"{config.name}-{config.resolution}-{list_images(config.path, config.classes).digest}"
    if config.name == "prepared":
        return check_prepared(config).identity
    # The digits, which are small.
    pixels = config.model_copy(update={"vae": None, "text_encoder": None, "num_classes": None})
    return load_images(pixels, cache_dir).identity
