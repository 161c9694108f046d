"""Data: images and their latents, decoded once, cached, and shared by all processes of a machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtr_ray.data.dataset import ImageData
    from dtr_ray.data.images import check_data, load_images

__all__ = ["ImageData", "check_data", "load_images"]

_MODULES = {"ImageData": "dataset", "check_data": "images", "load_images": "images"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: `prepare` lists files by modules of this package, without torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
