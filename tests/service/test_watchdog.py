"""When a trial is held to hang: measured by its own steps, on a clock of the driver's."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_sweeps import folder_of, tiny_sweep, wait_until

from dtr_ray.search.state import SweepState
from dtr_ray.service import attempts, processes
from dtr_ray.service.attempts import AttemptLog, read_heartbeat
from dtr_ray.service.processes import Process
from dtr_ray.service.watchdog import TrialWatch


@pytest.fixture
def state(tmp_path: Path) -> SweepState:
    """Of a sweep with two trials under way."""
    changes = {"failures__hang_timeout_s": 20.0, "failures__stall_timeout_s": 600.0}
    config = tiny_sweep(tmp_path, **changes)
    folder_of(config).mkdir()
    found = SweepState(config, folder_of(config))
    for _ in range(2):
        found.next_trial()
    return found


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Trial:
    """Tells of itself as a trial's process does."""

    def __init__(self, state: SweepState, trial_id: str, clock: Clock) -> None:
        folder = state.trial_folder(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        self._clock, self._log, self._step = clock, AttemptLog(folder), 0

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._clock.now += seconds
            self._step += 1
            self._log.made(self._step)

    def tell(self, phase: str, seconds: float) -> None:
        self._clock.now += seconds
        self._log.tell(self._step, phase)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(attempts.time, "monotonic", found.monotonic)
    return found


@pytest.fixture
def ended() -> list[Process]:
    return []


@pytest.fixture
def watch(state: SweepState, ended: list[Process]) -> TrialWatch:
    def enlisted(folder: Path) -> list[Process]:
        return [Process(role, folder.name, 1, 1, 0) for role in ("worker0", "trial")]

    def end(which: list[Process]) -> list[Process]:
        ended.extend(which)
        return which

    return TrialWatch(state, {}, enlisted, end)


def silence(watch: TrialWatch, clock: Clock, ended: list[Process], most_s: float = 5000.0) -> float | None:
    """How many seconds of silence it bears, in seconds of looks; None where it bears them all."""
    start, before = clock.now, len(ended)
    while clock.now < start + most_s:
        watch.look(clock.now)
        if len(ended) > before:
            return clock.now - start
        clock.now += 1.0
    return None


@pytest.mark.parametrize(("step_s", "borne_s"), [(0.1, 20), (1.9, 20), (5.0, 50), (30.0, 300), (100.0, 600)])
def test_a_trial_may_be_silent_for_ten_of_its_longest_steps_within_limits(
    step_s: float, borne_s: float, state: SweepState, clock: Clock, watch: TrialWatch, ended: list[Process]
):
    trial = Trial(state, "t0000", clock)
    trial.steps(8, step_s)
    assert silence(watch, clock, ended) == pytest.approx(borne_s, abs=1.5)
    assert [process.role for process in ended] == ["worker0"]


def test_what_nobody_has_been_through_may_take_as_long_as_a_stalled_sweep(
    state: SweepState, clock: Clock, watch: TrialWatch, ended: list[Process]
):
    trial = Trial(state, "t0000", clock)
    assert silence(watch, clock, ended, 590.0) is None
    trial.steps(8, 0.1)
    trial.tell("evaluating", 0.1)
    trial.tell("evaluating", 1.0)
    # The distance at its end takes longer than a batch of samples.
    assert silence(watch, clock, ended, 590.0) is None


def test_what_another_trial_of_the_machine_has_been_through_counts(
    state: SweepState, clock: Clock, watch: TrialWatch, ended: list[Process]
):
    other = Trial(state, "t0001", clock)
    other.steps(2, 0.1)
    other.tell("checkpointing", 0.1)
    other.steps(1, 7.0)
    trial = Trial(state, "t0000", clock)
    trial.steps(2, 0.1)
    trial.tell("checkpointing", 0.1)
    watch.look(clock.now)
    state.finish("t0001", "completed")
    assert silence(watch, clock, ended) == pytest.approx(70, abs=1.5)


def test_waiting_for_the_sweep_is_no_hanging(
    state: SweepState, clock: Clock, watch: TrialWatch, ended: list[Process]
):
    trial = Trial(state, "t0000", clock)
    trial.steps(2, 0.1)
    trial.tell("waiting", 0.1)
    trial.steps(1, 0.2)
    trial.tell("waiting", 0.1)
    assert silence(watch, clock, ended, 590.0) is None


def test_the_reason_names_phase_step_and_what_it_is_compared_with(
    state: SweepState, clock: Clock, ended: list[Process]
):
    hung: dict[str, str] = {}
    watch = TrialWatch(state, hung, lambda folder: [Process("worker0", "n", 1, 1, 0)], lambda which: which)
    trial = Trial(state, "t0000", clock)
    trial.steps(57, 0.25)
    for _ in range(30):
        watch.look(clock.now)
        clock.now += 1.0
    assert hung == {
        "t0000": "no sign of life for 21 s while training, after step 57 (the longest before took 0.25 s)"
    }


def test_what_looks_after_ended_workers_is_ended_too_where_nothing_follows(
    state: SweepState, clock: Clock, watch: TrialWatch, ended: list[Process]
):
    trial = Trial(state, "t0000", clock)
    trial.steps(8, 0.1)
    silence(watch, clock, ended)
    assert silence(watch, clock, ended) == pytest.approx(60, abs=1.5)
    assert [process.role for process in ended] == ["worker0", "trial"]
    Trial(state, "t0000", clock).steps(8, 0.1)
    assert read_heartbeat(state.trial_folder("t0000"))["attempt"] == 2
    watch.look(clock.now)
    assert silence(watch, clock, ended) == pytest.approx(20, abs=1.5)


def test_a_trial_that_has_died_and_waits_for_a_machine_does_not_hang(state: SweepState, clock: Clock):
    hung: dict[str, str] = {}
    watch = TrialWatch(state, hung, lambda folder: [Process("worker0", "n", 1, 1, 0)], lambda which: [])
    Trial(state, "t0000", clock).steps(2, 0.1)
    for _ in range(100):
        watch.look(clock.now)
        clock.now += 1.0
    assert hung == {}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_is_ended_and_one_that_has_got_its_number_is_not(
    sleeper: "subprocess.Popen[bytes]",
):
    born = processes._born(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    assert processes._end([Process("worker0", "here", sleeper.pid, born + 1, 0)]) == []
    right = [Process("worker0", "here", sleeper.pid, born, 0)]
    assert processes._end(right) == right
    wait_until(lambda: sleeper.poll() is not None, 5.0)
    assert processes._end(right) == []
