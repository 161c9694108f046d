"""Rows over many files: as one array, but read where it is needed."""

from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.cache import write_npy
from dtr_ray.data import rows as module
from dtr_ray.data.rows import Rows


def spread(folder: Path, array: np.ndarray, counts: list[int]) -> Rows:
    """The rows of an array in files of `counts` rows."""
    paths = [folder / f"{number:05d}.npy" for number in range(len(counts))]
    for path, part in zip(paths, np.split(array, np.cumsum(counts)[:-1]), strict=True):
        np.save(path, part)
    return Rows(paths, counts, array.shape[1:], array.dtype)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=9), data=st.data())
def test_rows_of_files_are_those_of_the_array(
    counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    array = np.random.default_rng(0).standard_normal((sum(counts), 2, 3)).astype(np.float16)
    rows = spread(tmp_path_factory.mktemp("rows"), array, counts)
    assert (len(rows), rows.shape, rows.dtype) == (len(array), array.shape, array.dtype)
    wanted = data.draw(st.lists(st.integers(0, len(array) - 1), max_size=20))
    indices = np.array(wanted, np.int64)
    sides = indices % 2
    for source in (rows, Rows.of_array(array)):
        assert np.array_equal(source.take(indices), array[indices])
        assert np.array_equal(source.take(indices, sides), array[indices, sides])
    taken = rows.take(indices)
    assert taken.flags.writeable
    assert taken.flags.owndata


def test_600_files_are_opened_when_they_are_read_and_few_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_MAPS", 20)
    array = np.arange(1200).reshape(1200, 1)
    before = open_files()
    rows = spread(tmp_path, array, [2] * 600)
    assert open_files() == before
    order = np.random.default_rng(0).permutation(1200)
    for indices in np.split(order, 12):
        assert np.array_equal(rows.take(indices), array[indices])
    assert open_files() - before == 20


def test_maps_leave_most_of_the_open_files_to_others() -> None:
    assert 16 <= module._MAX_MAPS <= max(16, module._OPEN_FILES // 8)


def test_threads_may_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_MAPS", 3)
    array = np.arange(200).reshape(200, 1)
    rows = spread(tmp_path, array, [5] * 40)
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(100):
            indices = generator.integers(0, 200, 16)
            if not np.array_equal(rows.take(indices), array[indices]):
                wrong.append(seed)

    threads = [Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_of_one_file_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "one.npy"
    array = np.arange(12, dtype=np.float32).reshape(6, 2)
    write_npy(path, array.shape, np.float32, [array[:4], array[4:]])
    rows = Rows.of_file(path)
    assert rows.is_mapped
    assert not Rows.of_array(array).is_mapped
    assert np.array_equal(rows.take(np.array([5, 0, 5])), array[[5, 0, 5]])


@pytest.mark.parametrize("damage", ["missing", "cut", "other shape", "other dtype", "text", "Fortran"])
def test_a_file_that_is_not_the_array_is_named(tmp_path: Path, damage: str) -> None:
    array = np.ones((6, 2, 3), np.float32)
    rows = spread(tmp_path, array, [3, 3])
    path = tmp_path / "00001.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "text":
        path.write_text("no array")
    else:
        part = {
            "other shape": array[:2],
            "other dtype": array[:3].astype(np.float64),
            "Fortran": np.asfortranarray(array[:3]),
        }[damage]
        np.save(path, part)
    assert rows.take(np.array([0, 2])).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"00001\.npy"):
        rows.take(np.array([0, 3]))
