"""Hugging Face's data sets on disk: images, labels and captions from the columns of a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtr_ray.config.prepare import HuggingFaceSource
from dtr_ray.sources.file_source import stripped
from dtr_ray.sources.files import FolderFiles
from dtr_ray.sources.layout import check_count, number_classes
from dtr_ray.sources.listing import Item, Source, digest_of
from dtr_ray.sources.tables import Table, open_table


class TableSource(Source):
    """Images in the rows of a table."""

    def __init__(
        self, table: Table, image: str, caption: str | None, labels: np.ndarray, class_names: tuple[str, ...]
    ) -> None:
        """`image` and `caption` are columns; captions are read where one is named."""
        columns = [image] if caption is None else [image, caption]
        digest = digest_of(table.root, [str(file.relative_to(table.root)) for file in table.files], *columns)
        super().__init__(table.names, labels, class_names, digest)
        self._labels = labels
        self._table = table
        self._columns = columns

    def read(self, index: int) -> Item:
        """The row's image as it is stored, and its captions where they were asked for."""
        name = f"{self._table.root}: {self.names[index]}"
        image, *captions = self._table.row(index, self._columns).values()
        texts = stripped(captions[0], name) if captions else ()
        return Item(_image_file(image, self._table.root, name), int(self._labels[index]), texts)


def huggingface_source(config: HuggingFaceSource, num_classes: int | None, captions: bool) -> Source:
    """The rows of one split. See `open_source`."""
    table = open_table(Path(config.path).expanduser(), config.split)
    where = f"{table.root}, split {config.split},"
    if captions and config.caption_column is None:
        raise ValueError(f"{where} name the column of the captions in source.caption_column")
    for name in (config.image_column, config.label_column, config.caption_column):
        if name is not None and name not in table.classes:
            raise ValueError(f"{where} has no column {name!r}; it has {', '.join(table.classes)}")
    if not len(table.names):
        raise ValueError(f"no image in {where} which is empty")
    labels = np.zeros(len(table.names), dtype=np.int64)
    class_names: tuple[str, ...] = ()
    if config.label_column is None:
        check_count(0, num_classes, f"{where} without source.label_column,")
    elif num_classes != 1:
        labels, class_names = _labels(table, config.label_column, num_classes, where)
    caption = config.caption_column if captions else None
    return TableSource(table, config.image_column, caption, labels, class_names)


def _labels(
    table: Table, column: str, num_classes: int | None, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels from numbers, named where the table says how, or from names of classes."""
    values = table.column(column)
    names: Sequence[str] | None = table.classes[column]
    kinds = {type(value) for value in values}
    if kinds == {str}:
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers[value] for value in values]
    elif kinds != {int}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{where} must have numbers, or names of classes, in {column!r}; there are {found}")
    return number_classes(values, num_classes, where, names)


def _image_file(value: Any, root: Path, name: str) -> bytes:
    """The bytes of an image as Hugging Face stores it: in `bytes`, or in the file `path`; or bytes alone."""
    found = value.get("bytes") if isinstance(value, dict) else value
    if found is None and isinstance(value, dict) and value.get("path"):
        path = root / value["path"]
        return FolderFiles(path.parent, [path.name]).read(0)
    if not isinstance(found, bytes):
        raise ValueError(f"{name} has no file of an image, but {type(found).__name__}")
    return found
