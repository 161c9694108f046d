"""Tables on disk in Hugging Face's two forms: what `save_to_disk` wrote, and parquet files.

They are listed quickly, pickle small, and are opened again by each process that reads; nothing is copied.
pyarrow, which the library `datasets` is built on, reads both.
"""

import importlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtr_ray.sources.listing import Names

_KNOWN_SPLITS = ("train", "test", "validation", "valid", "val", "dev")


class Table(ABC):
    """The rows of one split.

    Attributes:
        root: folder of the whole.
        files: what the split consists of.
        names: N texts, one a row.
        classes: of every column; names of the classes where it holds classes by number, else None.
    """

    root: Path
    files: Sequence[Path]
    names: Names
    classes: dict[str, list[str] | None]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # What this process has read: of a saved table all of it, mapped; of parquet files the last rows.
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """All values of a column."""

    @abstractmethod
    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Some values of one row, an image as it is stored, not decoded; any thread may read.

        Raises:
            ValueError: a file is damaged; the message names it.
        """


def open_table(root: Path, split: str) -> Table:
    """The table in a folder.

    Raises:
        ValueError: it is missing or damaged, or has no such split; or pyarrow is not installed.
    """
    if not root.is_dir():
        raise ValueError(f"the folder {root} does not exist")
    if (root / "dataset_dict.json").is_file():
        known = _json(root / "dataset_dict.json", "splits")
        if split not in known:
            raise ValueError(f"{root} has no split {split!r}; it has {', '.join(known)}")
        return SavedTable(root / split, split)
    if (root / "state.json").is_file():
        own = _json(root / "state.json", "_split")
        if own not in (None, split):
            raise ValueError(f"{root} has no split {split!r}; it is {own!r}")
        return SavedTable(root, split)
    return ParquetTable(root, split)


class SavedTable(Table):
    """A folder with Arrow files, memory-mapped, and `state.json` that lists them."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__()
        self.root = root
        self.files = [root / entry["filename"] for entry in _json(root / "state.json", "_data_files")]
        table = self._table()
        self.classes = _classes(table.schema)
        self.names = Names(f"{split}[{i}]" for i in range(table.num_rows))

    def column(self, name: str) -> list[Any]:
        """All values."""
        return list(self._table().column(name).to_pylist())

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """One row."""
        table = self._table()
        return {name: table.column(name)[index].as_py() for name in columns}

    def _table(self) -> Any:
        with self._lock:
            if not self._opened:
                arrow, ipc = _library("pyarrow"), _library("pyarrow.ipc")
                tables = []
                for file in self.files:
                    try:
                        tables.append(ipc.open_stream(arrow.memory_map(str(file))).read_all())
                    except (OSError, arrow.ArrowException) as error:
                        raise ValueError(f"{file} cannot be read: {error}") from error
                self._opened[0] = arrow.concat_tables(tables)
            return self._opened[0]


class ParquetTable(Table):
    """A folder of parquet files; a process holds the last two groups of rows that it read from."""

    _KEPT = 2

    def __init__(self, root: Path, split: str) -> None:
        super().__init__()
        self.root = root
        self.files = _parquet_files(root, split)
        groups: list[tuple[int, int, int]] = []
        names: list[str] = []
        for number, file in enumerate(self.files):
            opened = self._open(number)
            self.classes = _classes(opened.schema_arrow)
            counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            groups += [(number, i, count) for i, count in enumerate(counts)]
            names += [f"{file.relative_to(root).as_posix()}[{i}]" for i in range(sum(counts))]
        self.names = Names(names)
        # Rows: file, group within the file, number of its first row in the whole.
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._groups[:, 2] = np.cumsum(self._groups[:, 2]) - self._groups[:, 2]

    def column(self, name: str) -> list[Any]:
        """All values."""
        return [value for number in range(len(self.files)) for value in self._column(number, name)]

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """One row; the whole group of rows around it is read, once while rows are read in order."""
        place = int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1
        table, first = self._group(place, columns), int(self._groups[place, 2])
        return {name: table.column(name)[index - first].as_py() for name in columns}

    def _group(self, place: int, columns: Sequence[str]) -> Any:
        # One thread reads it, those that want its other rows wait for that.
        with self._lock:
            table = self._opened.pop(place, None)
            if table is None or not {*columns} <= {*table.column_names}:
                number, group, _ = self._groups[place].tolist()
                try:
                    table = self._open(number).read_row_group(group, columns=list(columns), use_threads=False)
                except (OSError, _library("pyarrow").ArrowException) as error:
                    raise ValueError(f"{self.files[number]} cannot be read: {error}") from error
            self._opened[place] = table
            while len(self._opened) > self._KEPT:
                del self._opened[next(iter(self._opened))]
            return table

    def _column(self, number: int, name: str) -> list[Any]:
        try:
            return list(self._open(number).read(columns=[name]).column(name).to_pylist())
        except (OSError, _library("pyarrow").ArrowException) as error:
            raise ValueError(f"{self.files[number]} cannot be read: {error}") from error

    def _open(self, number: int) -> Any:
        try:
            return _library("pyarrow.parquet").ParquetFile(self.files[number])
        except (OSError, _library("pyarrow").ArrowException) as error:
            raise ValueError(f"{self.files[number]} cannot be read as parquet: {error}") from error


def _parquet_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split: those with its name in theirs, or all for `train` where none has any."""
    files = sorted(file for file in root.rglob("*.parquet") if "/." not in f"/{file.relative_to(root)}")
    if not files:
        raise ValueError(f"{root} holds neither what save_to_disk writes nor .parquet files")

    def of(name: str) -> list[Path]:
        word = re.compile(rf"(^|[/_.-]){re.escape(name)}([/_.-]|$)")
        return [file for file in files if word.search(file.relative_to(root).as_posix())]

    others = [name for name in _KNOWN_SPLITS if name != split and of(name)]
    if not of(split) and (others or split != "train"):
        raise ValueError(
            f"{root} has no parquet file of a split {split!r}; it has {', '.join(others) or 'none'}"
        )
    return of(split) or files


def _classes(schema: Any) -> dict[str, list[str] | None]:
    """Every column, with the names of its classes where Hugging Face's metadata says that it has some."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata)["info"]["features"] if metadata else {}
    return {name: (features.get(name) or {}).get("names") for name in schema.names}


def _json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"source.type huggingface needs {name}: pip install pyarrow") from error
