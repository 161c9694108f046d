"""SampleFile: samples on disk in the format that the ADM evaluation reads."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from dtr_ray.config.files import make_folder


class SampleFile:
    """Writes an `.npz` of `arr_0`, uint8 (N, H, W, 3), and `arr_1`, labels int64 (N,), in little memory.

    Use as a context manager; the file appears, whole, when all went well. Gray becomes RGB.
    """

    def __init__(self, path: Path, labels: Tensor) -> None:
        """For the samples of the given labels, int64 (N,), which are then added in order."""
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._labels = labels.numpy()
        self._added = 0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Stored, not compressed: samples hardly compress, and readers can skip about in it.
        self._archive = zipfile.ZipFile(self._partial, "w")
        self._images: IO[bytes] | None = None
        return self

    def add(self, images: Tensor) -> None:
        """The next images, uint8 (B, 1 or 3, H, W)."""
        rows = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        if self._images is None:
            self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
            shape = (len(self._labels), *rows.shape[1:])
            header = {"descr": npy_format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
            npy_format.write_array_header_1_0(self._images, header)
        self._images.write(np.ascontiguousarray(rows).data)
        self._added += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._images is not None:
                self._images.close()
            if kind is None:
                assert self._added == len(self._labels)
                with self._archive.open("arr_1.npy", "w") as file:
                    npy_format.write_array(file, self._labels, allow_pickle=False)
            self._archive.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)


class SampleParts:
    """Blocks of samples on disk, from any worker in any order, that become a `SampleFile` in the end.

    Can be pickled for other processes; the folder is the caller's to remove.
    """

    def __init__(self, folder: Path) -> None:
        """In a folder that all workers see: empty at first, or absent."""
        self._folder = folder

    @classmethod
    @contextmanager
    def beside(cls, path: Path) -> Iterator[Self]:
        """In a folder beside the file that they are for, which is gone in the end."""
        make_folder(path.parent)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield cls(Path(folder))

    def part(self, name: str) -> Self:
        """Others, in a folder below."""
        return type(self)(self._folder / name)

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Samples of consecutive numbers, int64 (B,), uint8 (B, 1 or 3, H, W)."""
        self._folder.mkdir(exist_ok=True)
        np.save(self._folder / f"{int(indices[0]):012}.npy", images.cpu().numpy())

    def join(self, path: Path, labels: Tensor) -> None:
        """Writes the `.npz` of all samples, in order; labels int64 (N,)."""
        with SampleFile(path, labels) as file:
            for images in self.read():
                file.add(images)

    def read(self) -> Iterator[Tensor]:
        """Their images, uint8 (B, 1 or 3, H, W), in order; what was read is gone from the disk."""
        for path in sorted(self._folder.glob("*.npy")):
            yield torch.from_numpy(np.load(path, allow_pickle=False))
            path.unlink()
