"""Sources: the images of a data set wherever they are, listed and read one by one; nothing is copied."""

from dtr_ray.sources.opening import Item, Source, open_source

__all__ = ["Item", "Source", "open_source"]
