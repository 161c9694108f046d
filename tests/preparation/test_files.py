"""Files of a preparation: whole or not there, with right checksums; a full disk is told as one."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dtr_ray.preparation.files import ArrayFile, entry_of, partial_name, remove_partial_files, whole_file

# With a limit on the size of files a write fails as it does on a full disk.
_FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from dtr_ray.preparation.files import ArrayFile, DiskFullError, whole_file
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
file = ArrayFile(path, (1000,), np.uint8)
try:
    for _ in range(200):
        file.append(np.zeros((1, 1000), np.uint8))
    file.close()
except DiskFullError as error:
    print(error)
    file.discard()
try:
    with whole_file(path) as other:
        other.write(bytes(200_000))
except DiskFullError as error:
    print(error)
"""


@pytest.mark.parametrize("counts", [[1], [3, 4, 1], [1] * 120])
def test_an_array_that_grew_is_as_numpy_would_have_written_it(tmp_path: Path, counts: list[int]) -> None:
    values = np.random.default_rng(0).normal(size=(sum(counts), 2, 5)).astype(np.float32)
    file = ArrayFile(tmp_path / "below" / "x.npy", (2, 5), np.float32)
    for part in np.split(values, np.cumsum(counts)[:-1]):
        file.append(part)
    assert not (tmp_path / "below" / "x.npy").exists()
    entry = file.close()
    content = (tmp_path / "below" / "x.npy").read_bytes()
    assert entry is not None
    assert (entry.sha256, entry.num_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    np.testing.assert_array_equal(np.load(tmp_path / "below" / "x.npy", mmap_mode="r"), values)
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["x.npy"]


def test_an_array_without_rows_is_no_file(tmp_path: Path) -> None:
    assert ArrayFile(tmp_path / "x.npy", (3,), np.uint8).close() is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"after")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"before", [path])
    with whole_file(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert entry_of(path).num_bytes == 5


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pixels").mkdir()
    left, kept = partial_name(tmp_path / "pixels" / "0.npy"), tmp_path / "pixels" / "1.npy"
    for path in (left, kept):
        path.touch()
    remove_partial_files(tmp_path)
    assert list((tmp_path / "pixels").iterdir()) == [kept]


def test_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "x.npy")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"no room for {tmp_path / 'x.npy'}: ") for line in lines)
    assert list(tmp_path.iterdir()) == []
