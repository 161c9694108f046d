"""Parts of a computation on Ray: all results, once each; lost processes are made up for, errors are told."""

import os
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from dtr_ray.service.parts import run_parts

# Workers cannot import a test's module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def square(part: int, device: str) -> int:
    return part * part


def where(part: object, device: str) -> tuple[str, str, int]:
    return device, str(Path.cwd()), os.getpid()


def die_once(part: Path, device: str) -> int:
    """The first process that comes here leaves a mark, and is killed."""
    if not part.exists():
        part.touch()
        os.kill(os.getpid(), 9)
    return 7


def die(part: int, device: str) -> None:
    os.kill(os.getpid(), 9)


def fail(part: int, device: str) -> int:
    if part == 1:
        raise ValueError("this part is wrong")
    return part


def busy(part: Path, device: str) -> int:
    """How many are at work at once."""
    mine = part / str(time.monotonic_ns())
    mine.touch()
    time.sleep(0.3)
    count = len(list(part.iterdir()))
    mine.unlink()
    return count


def test_every_part_has_its_result(ray_cluster: str):
    assert dict(run_parts(square, range(23))) == {part: part * part for part in range(23)}


def test_relative_paths_mean_what_they_mean_to_the_caller(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ((_, (device, folder, process)),) = run_parts(where, [None])
    assert (device, folder) == ("cpu", str(tmp_path))
    assert process != os.getpid()


def test_a_part_whose_process_is_killed_is_run_again(ray_cluster: str, tmp_path: Path):
    marks = [tmp_path / name for name in "abc"]
    assert sorted(run_parts(die_once, marks)) == [(0, 7), (1, 7), (2, 7)]
    assert all(mark.exists() for mark in marks)


@pytest.mark.slow
def test_a_part_that_always_kills_its_process_is_given_up(ray_cluster: str):
    with pytest.raises(RuntimeError, match="a worker was lost 4 times"):
        list(run_parts(die, [0]))


def test_the_error_of_a_part_is_raised_as_it_is(ray_cluster: str):
    with pytest.raises(ValueError, match=r"^this part is wrong$"):
        list(run_parts(fail, range(6)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_more_parts_run_at_once_than_are_allowed(ray_cluster: str, tmp_path: Path, num_workers: int):
    counts = [count for _, count in run_parts(busy, [tmp_path] * 6, num_workers)]
    assert max(counts) <= num_workers


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="num_workers is 0: it must be at least 1"):
        list(run_parts(square, [1], 0))
