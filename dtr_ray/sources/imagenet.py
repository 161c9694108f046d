"""ImageNet as it is downloaded: folders named by synsets, or the tar of a tar for each of them."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtr_ray.config.prepare import ImageNetSource
from dtr_ray.sources.archives import tar_members
from dtr_ray.sources.file_source import FileSource
from dtr_ray.sources.files import Archives, Files, FolderFiles, TarFiles
from dtr_ray.sources.folder import list_images, subfolders
from dtr_ray.sources.layout import is_image, lay_out, number_classes, safe_names
from dtr_ray.sources.listing import Names, Source, digest_of

_SYNSET = re.compile(r"n\d{8}")
_WORDS = "LOC_synset_mapping.txt"
# Kaggle's copy has it at the top, above ILSVRC/Data/CLS-LOC/train.
_LEVELS_UP = 5


def imagenet_source(config: ImageNetSource, num_classes: int | None, captions: bool) -> Source:
    """ImageNet's training images, classes in the order of their synsets. See `open_source`."""
    path = Path(config.path).expanduser()
    if captions:
        raise ValueError(f"{path}: ImageNet has no captions")
    where = str(path)
    files: Files
    if path.is_dir():
        synsets = [folder.name for folder in subfolders(path)]
        _check_synsets(synsets, where)
        found = list_images(where, len(synsets))
        numbers, digest = found.labels, found.digest
        files = FolderFiles(path, found.names)
    else:
        names, unordered = _list_tar(path)
        layout = lay_out(names, None, where)
        numbers, synsets, digest = (
            layout.labels.tolist(),
            list(layout.class_names),
            digest_of(path.parent, [path.name]),
        )
        files = unordered.take(layout.order)
    labels, class_names = number_classes(numbers, num_classes, where, synsets)
    return FileSource(files.names, labels, _words(path, class_names), digest, files, None)


def _check_synsets(folders: Sequence[str], where: str) -> None:
    odd = [name for name in folders if not _SYNSET.fullmatch(name)]
    if odd or not folders:
        found = f"but {odd[0]!r} is none" if odd else "but there is none"
        raise ValueError(f"{where} must hold folders, or tars, named by synsets (n01440764), {found}")


def _list_tar(path: Path) -> tuple[list[str], TarFiles]:
    """The images of the inner tars, called `n01440764/n01440764_10026.JPEG` as their folders would be."""
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file")
    names: list[str] = []
    places: list[tuple[int, int]] = []
    for synset, start, size in tar_members(path):
        folder = synset.removeprefix("./").removesuffix(".tar")
        _check_synsets([folder] if synset.endswith(".tar") else [synset], str(path))
        for name, first, length in tar_members(path, start):
            if first + length > start + size:
                raise ValueError(f"{path}: {synset} is cut off in {name}")
            if is_image(name.removeprefix("./")):
                names.append(f"{folder}/{name.removeprefix('./')}")
                places.append((first, length))
    names = safe_names(names, str(path))
    starts, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return names, TarFiles(Archives([path]), Names(names), np.zeros(len(names)), starts, sizes)


def _words(path: Path, synsets: Sequence[str]) -> tuple[str, ...]:
    """What the synsets are called, by LOC_synset_mapping.txt beside or above; else the synsets themselves."""
    if not synsets:
        return ()
    places = [path, *path.absolute().parents[:_LEVELS_UP]]
    found = next((place / _WORDS for place in places if (place / _WORDS).is_file()), None)
    if found is None:
        return tuple(synsets)
    try:
        lines = found.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{found} cannot be read: {error}") from error
    words = {synset: text.strip() for synset, _, text in (line.strip().partition(" ") for line in lines)}
    for synset in synsets:
        if not words.get(synset):
            raise ValueError(f"{found} has no words for the synset {synset}")
    return tuple(words[synset] for synset in synsets)
