"""A disk that is full is waited for; what was written durably outlives a power-off, whole."""

import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from power import power_log
from preloaded import can_build
from small_disks import fill, small_disk
from tiny_trials import tiny_config

from dtr_ray import disk
from dtr_ray.command import run_command
from dtr_ray.disk import (
    DiskFullError,
    disk_full_error,
    is_full,
    is_waiting,
    make_folder_durably,
    tells,
    tried,
    with_room,
    write_durably,
)
from dtr_ray.search.journal import Journal, read_events
from dtr_ray.service import attempts
from dtr_ray.service.attempts import AttemptLog, read_heartbeat
from dtr_ray.service.records import RecordWriter, read_lines
from dtr_ray.training.state import TrainingState, checkpoint_folder, find_damage


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_LOOK_S", 0.001)
    monkeypatch.setattr(disk, "_waiting", disk._Waiting())


def failing(times: int, error: Exception) -> Callable[[], int]:
    calls = iter(range(times + 1))

    def write() -> int:
        number = next(calls)
        if number < times:
            raise error
        return number

    return write


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_waited_for_with_two_lines_and_signs_of_life(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
):
    signs: list[bool] = []
    with tells(lambda: signs.append(is_waiting())), caplog.at_level(logging.WARNING):
        assert with_room(tmp_path, failing(4, error)) == 4
    assert signs == [True] * 4
    assert not is_waiting()
    first, last = [record.getMessage() for record in caplog.records]
    assert str(tmp_path) in first
    assert "free space there" in first
    assert "DTR_RAY_DISK_WAIT_HOURS" in first
    assert "room again" in last


def test_other_errors_are_not_waited_for(tmp_path: Path):
    with pytest.raises(PermissionError):
        with_room(tmp_path, failing(1, PermissionError(errno.EACCES, "no")))
    assert not is_full(ValueError("full"))


def test_an_error_that_hides_a_full_disk_is_known_by_what_led_to_it():
    hidden = RuntimeError("unexpected pos 704 vs 598")
    hidden.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_full(hidden)


def test_after_the_hours_are_over_the_reason_is_told_and_nobody_waits_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DTR_RAY_DISK_WAIT_HOURS", "0.00001")
    full = failing(10**9, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        with_room(tmp_path, full)
    started = time.monotonic()
    with pytest.raises(DiskFullError) as raised:
        with_room(tmp_path, full)
    assert time.monotonic() - started < 0.1
    wrapped = RuntimeError("what Ray makes of it")
    wrapped.__cause__ = raised.value
    assert disk_full_error(wrapped) is raised.value

    def command() -> int:
        raise wrapped

    assert run_command(command, "python -m dtr_ray.sweep a.yaml --resume") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the disk of ")
    assert said.endswith("python -m dtr_ray.sweep a.yaml --resume\n")
    assert "Traceback" not in said


@pytest.mark.parametrize("hours", ["soon", "-1", "nan", "inf"])
def test_hours_that_are_none_are_refused(hours: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTR_RAY_DISK_WAIT_HOURS", hours)
    with pytest.raises(ValueError, match=f"number of hours, not '{hours}'"):
        disk.wait_hours()


def test_an_interrupted_wait_leaves_no_other_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = failing(10**9, OSError(errno.ENOSPC, "No space left on device"))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        with_room(tmp_path, full)
    with pytest.raises(DiskFullError):
        with_room(tmp_path, full)


def test_one_that_writes_several_files_starts_over_as_a_whole(tmp_path: Path):
    inner, outer = failing(1, OSError(errno.ENOSPC, "full")), []

    def write() -> None:
        outer.append(1)
        with_room(tmp_path, inner)

    assert not tried(tmp_path, write)
    assert tried(tmp_path, write)
    assert outer == [1, 1]


def test_what_needs_more_room_than_there_is_is_not_tried_again_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = iter([10, 20, 30, 5000])
    monkeypatch.setattr(disk, "free_bytes", lambda folder: (next(free, 5000), 10_000))
    looks: list[int] = []
    with tells(lambda: looks.append(1)):
        with_room(tmp_path, failing(1, OSError(errno.ENOSPC, "full")), 4000)
    assert len(looks) == 3


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    write_durably(tmp_path / "a.json", "one")
    (tmp_path / "a.json.tmp").write_text("left by a crash")
    write_durably(tmp_path / "a.json", b"two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "two")]


def test_folders_are_made_with_those_above_them(tmp_path: Path):
    make_folder_durably(tmp_path / "a" / "b" / "c")
    make_folder_durably(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, full to its last page; after a while there is room again."""
    with small_disk(tmp_path / "small", "4m") as folder:
        yield folder


@contextmanager
def full_for_a_while(folder: Path) -> Iterator[None]:
    ballast = fill(folder)
    timer = threading.Timer(0.2, ballast.unlink)
    timer.start()
    yield
    assert not ballast.exists(), "nobody has waited"
    timer.join()


def test_the_journal_waits_for_room_and_holds_each_event_once(small: Path):
    journal = Journal(small / "journal.jsonl")
    # So long that only a part of it goes into the page that the file has.
    params = {"routing.alpha": "x" * 3000}
    for number in range(2):
        with full_for_a_while(small) if number else nullcontext():
            journal.write("trial", id=f"t{number:04d}", number=number, params=params)
    journal.close()
    assert [event["number"] for event in read_events(small / "journal.jsonl")] == [0, 1]


def test_a_checkpoint_waits_for_room_and_leaves_no_half_of_itself_meanwhile(small: Path):
    config = tiny_config()
    state = TrainingState.build(config, torch.device("cpu"))
    state.step = 1
    state.save(checkpoint_folder(small, 1), config)
    state.step = 2
    halves: list[int] = []
    with full_for_a_while(small), tells(lambda: halves.append(len(list(small.rglob("*.part"))))):
        state.save(checkpoint_folder(small, 2), config)
    assert set(halves) == {0}
    assert [find_damage(checkpoint_folder(small, step)) for step in (1, 2)] == [None, None]


def test_records_that_could_not_be_written_are_when_they_are_to_be_settled(small: Path):
    writer = RecordWriter(small / "a" / "worker.jsonl")
    with full_for_a_while(small):
        for step in range(200):
            writer.metrics(step, {"loss": float(step)})
        assert writer.num_waiting > 0
        with_room(small, writer.settle)
    assert writer.num_waiting == 0
    writer.close()
    lines = read_lines(small / "a" / "worker.jsonl", 0)
    assert [line.record["step"] for line in lines if line.record is not None] == list(range(200))


def test_signs_of_life_go_on_while_the_disk_is_full(small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "_PROGRESS_INTERVAL_S", 0.0)
    log = AttemptLog(small)
    with full_for_a_while(small):
        seen = []
        for step in range(1, 4):
            log.tell(step, disk.WAITING)
            seen.append(read_heartbeat(small))
        assert [(beat["step"], beat["phase"]) for beat in seen] == [(n, disk.WAITING) for n in (1, 2, 3)]
        with_room(small, lambda: (small / "more").write_bytes(bytes(10_000)))
    log.close()


WRITER = """
import os, sys
from pathlib import Path
from dtr_ray.disk import make_folder_durably, sync, write_durably
folder = Path(sys.argv[1])
make_folder_durably(folder / "a" / "b")
write_durably(folder / "a" / "b" / "kept", "one")
write_durably(folder / "a" / "b" / "kept", "two")
(folder / "a" / "b" / "lost").write_text("no sync")
with (folder / "log").open("w") as log:
    log.write("1"); log.flush(); os.fsync(log.fileno()); log.write("2")
sync(folder)
(folder / "old").unlink()
(folder / "log").rename(folder / "renamed")
os.truncate(folder / "renamed", 0)
"""


@pytest.mark.skipif(not can_build(), reason="needs gcc")
def test_what_was_written_durably_outlives_a_power_off_and_the_rest_does_not(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("from before")
    with power_log(tmp_path / "out") as power:
        environment = {**os.environ, **power.env, "PYTHONPATH": str(Path(disk.__file__).parents[1])}
        command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
        subprocess.run(command, env=environment, check=True)
        lost = power.cut(random.Random(1), worst=True)
        files = {p.relative_to(tmp_path / "out"): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
        found = {str(name): path.read_text() for name, path in files.items()}
        assert found == {"a/b/kept": "two", "log": "1", "old": "from before"}
        assert lost.names == ["a/b/lost", "log", "old", "renamed"]
        # What is there after a power-off is on the disk.
        assert power.cut(random.Random(2)).names == []
