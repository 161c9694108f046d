"""A sweep whose disk fills up again and again, at random moments, waits for room and ends right.

On a small file system of its own, which needs the right to mount one. Takes about five minutes on two cores:

    python -m pytest -m slow tests/service/test_disk_full.py -n 0 -s --timeout 3600
"""

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import check_accounts, check_mlflow, check_steps, run_to_the_end
from small_disks import fill, small_disk
from tiny_sweeps import SweepCommand, folder_of, sweep_command, tiny_sweep, wait_until

from dtr_ray.disk import WAITING
from dtr_ray.search.journal import read_events
from dtr_ray.service.attempts import read_heartbeat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CHANGES = {
    "search__num_trials": 6,
    "search__num_startup_trials": 3,
    "trial__training__num_steps": 120,
    "trial__training__batch_size": 192,
    "trial__training__log_every_steps": 5,
    "trial__training__checkpoint_every_steps": 20,
    "trial__evaluation__every_steps": 60,
    "early_stopping__grace_steps": 60,
    "resources__max_concurrent": 1,
}


@pytest.fixture
def small() -> Iterator[Path]:
    """A file system of 80 MB; its path is short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="s") as place, small_disk(Path(place) / "small", "80m") as folder:
        yield folder


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """No byte is left in the folder meanwhile."""
    ballast = fill(folder)
    yield
    ballast.unlink()


def test_a_sweep_waits_for_room_and_goes_on_by_itself(
    small: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_sweep(small, **CHANGES)
    folder, rng, seen = folder_of(config), random.Random(5), []
    with sweep_command(config) as command:
        wait_until(lambda: list(folder.glob("trials/*/attempts.jsonl")), 500.0)
        for _ in range(5):
            time.sleep(rng.uniform(0.5, 4.0))
            if command.process.poll() is not None:
                break
            with full(small):
                time.sleep(rng.uniform(8.0, 20.0))
                seen.append(_doing(folder))
                assert command.process.poll() is None, command.output
        assert command.wait(600.0) == 0, command.output
        output = command.output
    with capsys.disabled():
        print("\nwhile the disk was full:", seen)
        print("\n".join(line for line in output.splitlines() if "room" in line or "full" in line))
    assert "free space there" in output
    assert "there is room again" in output
    check_accounts(config)
    check_mlflow(config)
    assert check_steps(config) == 0
    assert not [event for event in read_events(folder / "journal.jsonl") if event["event"] == "give_up"]


def _doing(folder: Path) -> list[str]:
    beats = {path.name: read_heartbeat(path) for path in sorted((folder / "trials").iterdir())}
    return [f"{name} {beat.get('phase')} {beat.get('step')}" for name, beat in beats.items()][-1:]


def test_a_sweep_that_has_waited_too_long_says_so_and_goes_on_when_it_is_resumed(
    small: Path, shared_cache: Path
):
    config = tiny_sweep(small, **CHANGES | {"search__num_trials": 2})
    folder = folder_of(config)
    with sweep_command(config, DTR_RAY_DISK_WAIT_HOURS="0.002") as command:
        wait_until(lambda: list(folder.glob("trials/*/attempts.jsonl")), 500.0)
        with full(small):
            assert command.wait(300.0) == 1, command.output
        output = command.output
    assert "DTR_RAY_DISK_WAIT_HOURS" in output
    assert "--resume" in output
    assert "Traceback" not in output
    run_to_the_end(config, "--resume")
    check_accounts(config)
    check_mlflow(config)


def test_an_interrupted_wait_ends_at_once(small: Path, shared_cache: Path):
    config = tiny_sweep(small, **CHANGES)
    folder = folder_of(config)
    with sweep_command(config) as command:
        wait_until(lambda: list(folder.glob("trials/*/attempts.jsonl")), 500.0)
        with full(small):
            wait_until(lambda: "free space there" in command.output or _waits(folder), 500.0)
            time.sleep(5.0)
            _interrupt(command)
            started = time.monotonic()
            assert command.wait(60.0) == 130, command.output
            assert time.monotonic() - started < 30
        assert "--resume" in command.output
    shutil.rmtree(folder / ".ray", ignore_errors=True)


def test_where_ray_s_temporary_folder_is_full_the_sweep_ends_right_or_is_resumed(
    tmp_path: Path, small: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_sweep(tmp_path, **CHANGES)
    folder = folder_of(config)
    with sweep_command(config, RAY_TMPDIR=str(small)) as command:
        wait_until(lambda: list(folder.glob("trials/*/attempts.jsonl")), 500.0)
        with full(small):
            time.sleep(60.0)
        code = command.wait(900.0)
        output = command.output
    with capsys.disabled():
        print(f"\nwith Ray's temporary folder full: exit code {code}, {output[-2000:]}")
    if code:
        run_to_the_end(config, "--resume")
    check_accounts(config)
    check_mlflow(config)
    check_steps(config)


def _waits(folder: Path) -> bool:
    return any(read_heartbeat(path).get("phase") == WAITING for path in (folder / "trials").iterdir())


def _interrupt(command: SweepCommand) -> None:
    command.signal(2, [-command.process.pid])
