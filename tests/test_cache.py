"""The cache: a file is built once, whole, by one process."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from dtr_ray.cache import build_once, cache_dir, write_npy


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("DTR_RAY_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dtr_ray"


def test_a_build_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        build_once(path, fail)
    assert [p.name for p in path.parent.iterdir()] == [".file.bin.lock"]
    build_once(path, lambda temporary: temporary.write_bytes(b"whole") and None)
    assert path.read_bytes() == b"whole"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="DTR_RAY_CACHE"):
        build_once(tmp_path / "file" / "x.npy", lambda temporary: None)


def test_an_array_written_in_chunks_reads_as_one(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (7, 3, 2), dtype=np.uint8)
    write_npy(tmp_path / "a.npy", array.shape, np.uint8, iter([array[:4], array[4:]]))
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)


def _slow_build(path: Path, log: Path) -> None:
    def build(temporary: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        temporary.write_text("done")

    build_once(path, build)
    assert path.read_text() == "done"


def test_two_processes_build_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    args = (tmp_path / "file", tmp_path / "log")
    processes = [context.Process(target=_slow_build, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1
