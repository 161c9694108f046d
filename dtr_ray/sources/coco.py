"""MS-COCO: images in a folder, their captions in one JSON file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dtr_ray.config.prepare import CocoSource
from dtr_ray.sources.file_source import CaptionTexts, FileSource, stripped
from dtr_ray.sources.files import FolderFiles
from dtr_ray.sources.layout import check_count, no_image, safe_names
from dtr_ray.sources.listing import Source, digest_of


def coco_source(config: CocoSource, num_classes: int | None, captions: bool) -> Source:
    """The images that the captions' file lists, in the order of their names. See `open_source`."""
    root, path = Path(config.path).expanduser(), Path(config.annotations).expanduser()
    if not root.is_dir():
        raise ValueError(f"the folder {root} does not exist")
    check_count(0, num_classes, str(path))
    texts = _read(path)
    if not texts:
        raise no_image(str(path))
    names = sorted(texts)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(names)} images that {path} lists are not in {root}"
        raise ValueError(f"{count}, such as {missing[0]}")
    own = None
    if captions:
        own = CaptionTexts([stripped(texts[name], f"{path}: {name}") for name in names])
    digest = digest_of(path.parent, [path.name])[:8] + digest_of(root, names)[:8]
    files = FolderFiles(root, names)
    return FileSource(files.names, np.zeros(len(names), dtype=np.int64), (), digest, files, own)


def _read(path: Path) -> dict[str, list[str]]:
    """The captions of each file name."""
    try:
        content = json.loads(path.read_bytes())
        images = {_entry(image, "id", int): _entry(image, "file_name", str) for image in content["images"]}
        safe_names(images.values(), str(path))
        texts: dict[str, list[str]] = {name: [] for name in images.values()}
        for annotation in content["annotations"]:
            texts[images[_entry(annotation, "image_id", int)]].append(_entry(annotation, "caption", str))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        rule = "must be COCO's captions: images with id and file_name, annotations with image_id and caption"
        raise ValueError(f"{path} {rule}: {error!r}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return texts


def _entry(of: Any, key: str, kind: type) -> Any:
    value = of[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r:.80}")
    return value
