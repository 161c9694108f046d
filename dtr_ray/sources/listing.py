"""What every source of images is: a list that a process may receive whole, and reading by number.

N images; K classes.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Item:
    """One image as its source holds it, not decoded where it is a file."""

    data: bytes | Image.Image
    label: int
    """In [0, num_classes); 0 without classes."""
    captions: tuple[str, ...]
    """At least one where captions were asked for, else empty."""


class Texts(Sequence[str]):
    """Texts that are made when they are asked for."""

    @abstractmethod
    def text(self, number: int) -> str:
        """The text of a number in [0, N)."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One text, or a list of them."""
        chosen = range(len(self))[index]
        return self.text(chosen) if isinstance(chosen, int) else [self.text(number) for number in chosen]


class Names(Texts):
    """Many short texts in two arrays: a million file names pickle in a moment and share memory in Ray."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def text(self, number: int) -> str:
        """The text."""
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].tobytes().decode("utf-8", "surrogatepass")


class Source(ABC):
    """The images of a data set where they are, listed but not read; nothing is copied.

    It may be pickled and sent to other processes, which open the files themselves; several threads may read.

    Attributes:
        names: N texts, what a message calls each image.
        labels: int64 (N,), in [0, num_classes); None where only reading tells. All 0 without classes.
        class_names: of the K classes; empty without classes.
        digest: 16 hex digits that stand for the content, by names, sizes and times of the files.
    """

    def __init__(
        self, names: Sequence[str], labels: np.ndarray | None, class_names: tuple[str, ...], digest: str
    ) -> None:
        self.names = names
        self.labels = labels
        self.class_names = class_names
        self.digest = digest

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 without."""
        return max(1, len(self.class_names))

    @abstractmethod
    def read(self, index: int) -> Item:
        """The image of the given number in [0, N).

        Raises:
            ValueError: it or its captions cannot be read; the message names file and member. A file that
                is read may still fail to decode: see `dtr_ray.data.decoding.decode`.
        """


def digest_of(root: Path, names: Iterable[str], *parts: str) -> str:
    """16 hex digits by the names, sizes and times of files below `root`, and by which parts of them are used.

    Raises:
        ValueError: a file cannot be looked up.
    """
    digest = hashlib.sha256("".join(f"{part}\0" for part in parts).encode())
    for name in names:
        status = status_of(os.path.join(root, name))  # noqa: PTH118  (a fifth of pathlib's time)
        entry = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(entry.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def status_of(path: str | Path) -> os.stat_result:
    """`os.stat(path)`; raises ValueError with the path where that fails."""
    try:
        return os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
