"""open_source: the images of a data set wherever they are, all kinds behind one interface.

source = open_source(config.source, config.num_classes, captions=config.text_encoder is not None)
item = source.read(17)
pixels = decode(item.data, resolution, source.names[17])  # dtr_ray.data.decoding
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dtr_ray.config.prepare import CocoSource, FolderSource, SourceConfig
from dtr_ray.sources.archives import archive_source
from dtr_ray.sources.captions import caption_file, check_captions
from dtr_ray.sources.coco import coco_source
from dtr_ray.sources.file_source import CaptionFiles, FileSource
from dtr_ray.sources.files import FolderFiles
from dtr_ray.sources.folder import list_images
from dtr_ray.sources.huggingface import huggingface_source
from dtr_ray.sources.imagenet import imagenet_source
from dtr_ray.sources.listing import Item, Source, digest_of
from dtr_ray.sources.torchvision_sets import torchvision_source
from dtr_ray.sources.webdataset import webdataset_source

__all__ = ["Item", "Source", "open_source"]


def open_source(config: SourceConfig, num_classes: int | None, captions: bool) -> Source:
    """Lists the images of a source; reads none.

    Args:
        config: what and where it is.
        num_classes: 1 leaves the source's classes out; None takes those that it has, and with captions none.
        captions: whether the captions are wanted; each image must have one then.

    Raises:
        ValueError: it is missing, empty or damaged, has other than `num_classes` classes, or lacks captions.
    """
    if captions and num_classes is None:
        num_classes = 1
    # Other processes, which read, may be in another folder.
    paths = {key: str(Path(value).expanduser().absolute()) for key, value in _paths(config)}
    config = config.model_copy(update=paths)
    return _SOURCES[config.type](config, num_classes, captions)


def _paths(config: SourceConfig) -> Iterator[tuple[str, str]]:
    yield "path", config.path
    if isinstance(config, CocoSource):
        yield "annotations", config.annotations


def _folder_source(config: FolderSource, num_classes: int | None, captions: bool) -> Source:
    found = list_images(config.path, num_classes)
    digest, texts = found.digest, None
    if captions:
        check_captions(found.root / name for name in found.names)
        files = [caption_file(Path(name)).as_posix() for name in found.names]
        digest = digest[:8] + digest_of(found.root, files)[:8]
        texts = CaptionFiles(FolderFiles(found.root, files))
    labels = np.array(found.labels, dtype=np.int64)
    images = FolderFiles(found.root, found.names)
    return FileSource(images.names, labels, found.class_names, digest, images, texts)


_SOURCES: dict[str, Callable[[Any, int | None, bool], Source]] = {
    "folder": _folder_source,
    "archive": archive_source,
    "webdataset": webdataset_source,
    "huggingface": huggingface_source,
    "imagenet": imagenet_source,
    "coco": coco_source,
    "torchvision": torchvision_source,
}
