"""Rows: one array in many pieces, in memory or in .npy files that are mapped when they are first read.

Shapes: N rows over all pieces, B of them at a time. The pages of a mapped file are the machine's: all
processes that read it share one copy.
"""

import mmap
import resource
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

# A map holds its file open; where a process may have 1,024 files open, that makes 128 maps.
_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MAX_MAPS = 4096 if _OPEN_FILES == resource.RLIM_INFINITY else max(16, min(4096, _OPEN_FILES // 8))


class Rows:
    """N rows of one shape and dtype, read by their numbers, by any thread.

    Attributes:
        shape: (N, ...), as an array's.
        dtype: of all pieces.
    """

    def __init__(
        self, pieces: Sequence[np.ndarray | Path], counts: Sequence[int], shape: tuple[int, ...], dtype: Any
    ) -> None:
        """Pieces of `counts` rows each, of shape `shape` and a dtype; files are not looked at yet."""
        assert len(pieces) == len(counts)
        self.shape = (sum(counts), *shape)
        self.dtype = np.dtype(dtype)
        self._pieces = pieces
        # First row of each piece, and the end.
        self._bounds = np.cumsum([0, *counts])
        self._maps: dict[int, np.ndarray] = {}
        self._lock = Lock()
        self._offsets: dict[int, int] = {}

    @classmethod
    def of_array(cls, array: np.ndarray) -> "Rows":
        """The rows of an array that is in memory."""
        return cls([array], [len(array)], array.shape[1:], array.dtype)

    @classmethod
    def of_file(cls, path: Path) -> "Rows":
        """The rows of one .npy file."""
        shape, dtype, _ = read_header(path)
        return cls([path], [shape[0]], shape[1:], dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_mapped(self) -> bool:
        """Whether the rows are in files, and none in this process's own memory."""
        return not any(isinstance(piece, np.ndarray) for piece in self._pieces)

    def take(self, indices: np.ndarray, *at: np.ndarray) -> np.ndarray:
        """A copy of the rows of the given numbers, (B, ...), as `array[indices, *at]` gives it.

        Args:
            indices: int64 (B,), in [0, N).
            at: int64 (B,) each: which entry of the following axes to take of each row.

        Raises:
            ValueError: a file is missing, or is not the array that it is to be.
        """
        if len(self._pieces) == 1:
            found: np.ndarray = self._piece(0)[(indices, *at)]
            return found
        pieces = np.searchsorted(self._bounds, indices, side="right") - 1
        order = np.argsort(pieces, kind="stable")
        numbers, starts = np.unique(pieces[order], return_index=True)
        taken = np.empty((len(indices), *self.shape[1 + len(at) :]), self.dtype)
        stops = [*starts[1:].tolist(), len(order)]
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops, strict=False):
            rows = order[start:stop]
            local = indices[rows] - self._bounds[number]
            taken[rows] = self._piece(number)[(local, *(axis[rows] for axis in at))]
        return taken

    def _piece(self, number: int) -> np.ndarray:
        piece = self._pieces[number]
        if isinstance(piece, np.ndarray):
            return piece
        found = self._maps.get(number)
        if found is None:
            with self._lock:
                if len(self._maps) >= _MAX_MAPS:
                    # The oldest one. Reads are random: which of them goes makes no difference.
                    del self._maps[next(iter(self._maps))]
                found = self._maps[number] = self._mapped(number, piece)
        return found

    def _mapped(self, number: int, path: Path) -> np.ndarray:
        start, stop = self._bounds[number : number + 2]
        expected = (int(stop - start), *self.shape[1:])
        if number not in self._offsets:
            shape, dtype, offset = read_header(path)
            if (shape, dtype) != (expected, self.dtype):
                raise ValueError(f"{path} holds {dtype} {shape}, not {self.dtype} {expected}")
            self._offsets[number] = offset
        try:
            with path.open("rb", buffering=0) as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.ndarray(expected, self.dtype, content, self._offsets[number])
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def read_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and dtype of a .npy file, and how many bytes its header has.

    Raises:
        ValueError: it is missing, or no .npy file in C order.
    """
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = readers[npy_format.read_magic(file)](file)
            offset = file.tell()
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error
    if fortran_order:
        raise ValueError(f"{path} is in Fortran's order")
    return shape, dtype, offset
