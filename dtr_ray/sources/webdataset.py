"""webdataset's shards: tars in which the files of one image share their name up to the first dot."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtr_ray.config.prepare import WebDatasetSource
from dtr_ray.sources.archives import TAR_SUFFIXES, list_tars
from dtr_ray.sources.file_source import CaptionFiles, FileSource
from dtr_ray.sources.files import TarFiles
from dtr_ray.sources.layout import check_count, no_image, number_classes
from dtr_ray.sources.listing import Source, Texts, digest_of

_IMAGES = ("jpg", "jpeg", "png", "webp")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NONE = -1


def webdataset_source(config: WebDatasetSource, num_classes: int | None, captions: bool) -> Source:
    """The images of tar shards, in the order of the shards and in theirs. See `open_source`."""
    shards = find_shards(config.path)
    names, files = list_tars(shards)
    images, classes, texts = _samples(names, files).T
    if not len(images):
        raise no_image(config.path)
    labels, class_names = _labels(images, classes, files, num_classes, config.path)
    if captions and (texts == _NONE).any():
        name = files.name(images[np.argmin(texts)])
        raise ValueError(f"{name} has no captions: there is neither a .txt nor a .json of its name")
    own = CaptionFiles(files.take(texts)) if captions else None
    top = Path(os.path.commonpath([shard.parent for shard in shards]))
    digest, found = digest_of(top, [str(shard.relative_to(top)) for shard in shards]), files.take(images)
    return FileSource(_ShardNames(found, top), labels, class_names, digest, found, own)


class _ShardNames(Texts):
    """Names of images with their shard's: `train-000.tar/000017.jpg`."""

    def __init__(self, files: TarFiles, top: Path) -> None:
        self._files = files
        self._top = top

    def __len__(self) -> int:
        return len(self._files.names)

    def text(self, number: int) -> str:
        """The shard's name and the image's."""
        return f"{self._files.archive(number).relative_to(self._top)}/{self._files.names[number]}"


def find_shards(path: str) -> list[Path]:
    """The shards in a folder, or those of a pattern with `*`, `?`, `[...]` or `{00000..00099}`, in order.

    Raises:
        ValueError: there is none, or one of a range is missing.
    """
    pattern = str(Path(path).expanduser())
    if Path(pattern).is_dir():
        found = [file for file in Path(pattern).iterdir() if file.name.lower().endswith(TAR_SUFFIXES)]
    else:
        found = [Path(file) for one in _expanded(pattern) for file in _matching(one)]
    found = sorted(file for file in found if not file.name.startswith("."))
    if not found:
        raise ValueError(f"no shard in {pattern} (looked for {', '.join(TAR_SUFFIXES)})")
    return found


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [one for n in numbers for one in _expanded(pattern[: match.start()] + n + pattern[match.end() :])]


def _matching(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    found = glob.glob(pattern)  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not found:
        raise ValueError(f"no shard is called {pattern}")
    return found


def _samples(names: Sequence[str], files: TarFiles) -> np.ndarray:
    """A row for each image, in order: positions of the image, its .cls and its captions; -1 where none."""
    rows: list[list[int]] = []
    rows_by_key: dict[tuple[int, str], list[int]] = {}
    for i, (name, shard) in enumerate(zip(names, files.numbers.tolist(), strict=True)):
        folder, slash, base = name.rpartition("/")
        key, _, suffix = base.partition(".")
        if not key:
            continue
        row = rows_by_key.setdefault((shard, folder + slash + key), [_NONE] * 3)
        suffix = suffix.lower()
        if suffix in _IMAGES:
            if row[0] != _NONE:
                raise ValueError(f"{files.name(i)} is a second image of its key, beside {names[row[0]]}")
            row[0] = i
            rows.append(row)
        elif suffix == "cls":
            row[1] = i
        elif suffix == "txt" or (suffix == "json" and row[2] == _NONE):
            row[2] = i
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _labels(
    images: np.ndarray, classes: np.ndarray, files: TarFiles, num_classes: int | None, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels from the .cls files, which must be there for all images or for none."""
    missing = np.flatnonzero(classes == _NONE)
    if num_classes == 1 or len(missing) == len(images):
        check_count(0, num_classes, where)
        return np.zeros(len(images), dtype=np.int64), ()
    if len(missing):
        raise ValueError(
            f"{files.name(images[missing[0]])} has no .cls, but others have: set num_classes to 1"
        )
    labels = []
    for number in classes.tolist():
        text = files.read(number)
        try:
            labels.append(int(text))
        except ValueError as error:
            raise ValueError(f"{files.name(number)} must be a class's number, not {text!r:.80}") from error
    return number_classes(labels, num_classes, where)
