"""Files of samples: what numpy and the ADM evaluation read, written batch by batch, whole or not at all."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy_format

from dtr_ray.evaluation.sample_file import SampleFile


def images(count: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, 5, 4), dtype=torch.uint8, generator=generator)


def test_numpy_reads_the_samples_and_their_labels(tmp_path: Path):
    path, everything, labels = tmp_path / "new" / "samples.npz", images(7), torch.arange(7) % 3
    with SampleFile(path, labels) as file:
        for batch in everything.split(3):
            file.add(batch)
    with np.load(path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], everything.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(arrays["arr_1"], labels.numpy())
    assert list(path.parent.iterdir()) == [path]


def test_the_adm_evaluations_reader_can_stream_it(tmp_path: Path):
    """It opens `arr_0.npy` inside the archive, reads a header of version 1 or 2, then row after row."""
    path, everything = tmp_path / "samples.npz", images(4)
    with SampleFile(path, torch.zeros(4, dtype=torch.int64)) as file:
        file.add(everything)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        assert npy_format.read_magic(stream) == (1, 0)
        shape, is_fortran, dtype = npy_format.read_array_header_1_0(stream)
        assert (shape, is_fortran, dtype) == ((4, 5, 4, 3), False, np.uint8)
        first = np.frombuffer(stream.read(60), np.uint8).reshape(5, 4, 3)
    assert np.array_equal(first, everything[0].permute(1, 2, 0).numpy())


def test_gray_becomes_rgb(tmp_path: Path):
    gray = images(2, channels=1)
    with SampleFile(tmp_path / "gray.npz", torch.zeros(2, dtype=torch.int64)) as file:
        file.add(gray)
    with np.load(tmp_path / "gray.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], gray.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def test_what_is_interrupted_leaves_the_old_file_alone(tmp_path: Path):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"before")

    def interrupted() -> None:
        with SampleFile(path, torch.zeros(4, dtype=torch.int64)) as file:
            file.add(images(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
