"""The wall clock jumps by hours and days while a sweep runs: nothing is stopped, lost or counted wrongly.

What is slow takes a minute on two cores:

    python -m pytest -m slow tests/service/test_clock.py -n 0 -s --timeout 600
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import check_accounts, check_mlflow, check_steps, runs_of
from mlflow import MlflowClient
from preloaded import build, can_build, set_clock
from tiny_sweeps import SweepCommand, attempts, folder_of, records, sweep_command, tiny_sweep, wait_until

from dtr_ray.search.journal import Journal, read_events, seconds_spent
from dtr_ray.service.records import RecordWriter, read_lines

DAY_S = 86400
JUMPS_S = (3 * DAY_S, -5 * DAY_S, 3600, -400 * DAY_S, 0)


class Clock:
    """The wall clock of processes that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        library, self._file = build("clock", folder), folder / "clock"
        self.shift(0)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file)}

    def shift(self, seconds: int) -> None:
        """Sets it to the right time and so many seconds."""
        set_clock(self._file, seconds)


@contextmanager
def wall_clock(patch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """This process's wall clock: the seconds to add."""
    shift, right, right_ns = [0.0], time.time, time.time_ns
    with patch.context() as here:
        here.setattr(time, "time", lambda: right() + shift[0])
        here.setattr(time, "time_ns", lambda: right_ns() + int(shift[0] * 1e9))
        yield shift


def test_the_time_spent_is_that_of_a_clock_that_never_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "journal.jsonl"
    with wall_clock(monkeypatch) as shift:
        for _ in range(3):
            started = time.monotonic()
            journal = Journal(path)
            before = seconds_spent(journal.events)
            shift[0] -= 2 * DAY_S
            journal.write("protocol", protocol={"data.identity": "x"}, proxy=None)
            journal.write("start")
            for days in (3, -10, 400):
                shift[0] += days * DAY_S
                time.sleep(0.02)
                journal.write("trial", id=f"t{len(journal.events):04d}", number=0, params={})
            journal.close()
            spent = seconds_spent(read_events(path)) - before
            assert 0.06 <= spent <= time.monotonic() - started


def test_journals_of_before_that_clock_are_read_and_a_jump_never_makes_their_time_negative():
    old = [{"event": "start", "time": 100.0}, {"event": "stop", "time": 160.0}]
    set_back = [{"event": "start", "time": 500.0}, {"event": "stop", "time": 20.0}]
    new = [
        {"event": "start", "time": 20.0, "elapsed_s": 0.5},
        {"event": "stop", "time": 0.0, "elapsed_s": 7.5},
    ]
    assert seconds_spent(old) == 60.0
    assert seconds_spent(old + set_back + new) == 67.0


def test_a_record_is_never_older_than_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tracking" / "t0000" / "driver.jsonl"
    with wall_clock(monkeypatch) as shift:
        for _ in range(2):
            with RecordWriter(path) as writer:
                writer.start("t0000", {}, {})
                shift[0] -= DAY_S
                writer.metrics(1, {"train_loss": 1.0})
                writer.end("FINISHED")
    times = [line.record["time_ms"] for line in read_lines(path, 0) if line.record is not None]
    assert len(times) == 5
    assert times == sorted(times)


def jump_while_it_trains(command: SweepCommand, clock: Clock, folder: Path, jumps_s: tuple[int, ...]) -> None:
    """A jump after every 20 further steps, of whatever trial; it stays until the journal has an event."""

    def made() -> int:
        assert command.process.poll() is None, command.output
        names = [path.name for path in (folder / "trials").glob("t*")]
        return sum(attempt.num_steps for name in names for attempt in attempts(folder, name))

    def seen() -> int:
        path = folder / "journal.jsonl"
        return len(read_events(path)) if path.exists() else 0

    for jump_s in jumps_s:
        due = made() + 20
        wait_until(lambda due=due: made() >= due, 600.0, "more steps")
        clock.shift(jump_s)
        before = seen()
        wait_until(lambda before=before: seen() > before, 600.0, "the next event")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not can_build(), reason="needs a compiler for the clock")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_whose_clock_jumps_by_days_ends_as_if_it_did_not(
    workers: int, tmp_path: Path, shared_cache: Path
):
    changes: dict[str, Any] = {
        "search__num_trials": 5,
        "resources__workers_per_trial": workers,
        "resources__max_concurrent": 3 - workers,
        "early_stopping": {"name": "none"},
        "trial__training__num_steps": 120,
        "trial__training__batch_size": 192,
        "trial__evaluation__every_steps": 60,
        "failures__retries": 0,
        "budget__max_hours": 1.0,
        "budget__max_device_hours": 1.0,
    }
    config, clock = tiny_sweep(tmp_path, **changes), Clock(tmp_path)
    folder, started = folder_of(config), time.monotonic()
    with sweep_command(config, RAY_ADDRESS="local", **clock.environment) as command:
        jump_while_it_trains(command, clock, folder, JUMPS_S)
        assert command.wait(900.0) == 0, command.output
    took_s = time.monotonic() - started
    check_accounts(config)
    check_mlflow(config)
    assert check_steps(config) == 0
    events = read_events(folder / "journal.jsonl")
    times = [event["time"] for event in events]
    assert max(times) - min(times) > 300 * DAY_S, "the clock has not jumped"
    assert [event["elapsed_s"] for event in events] == sorted(event["elapsed_s"] for event in events)
    assert 0 < seconds_spent(events) < took_s
    for trial_id, trial in records(folder).items():
        assert (trial.status, trial.retries) == ("completed", 0)
        assert 0 < trial.wall_s < took_s
        assert all(0 < values["train_seconds"] < took_s for step, values in trial.reports.items() if step)
        assert all(0 < attempt.last_s < took_s for attempt in attempts(folder, trial_id))
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    parent, children = runs_of(client, config.name)
    assert all(run.info.end_time >= run.info.start_time for run in (parent, *children.values()))
