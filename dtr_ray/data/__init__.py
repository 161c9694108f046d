"""Data: images and their latents, decoded once, cached, and shared by all processes of a machine."""

from dtr_ray.data.dataset import ImageData
from dtr_ray.data.images import check_data, load_images

__all__ = ["ImageData", "check_data", "load_images"]
