"""Sweeps that share a study in PostgreSQL repeat none of each other's trials, and lose none with it.

The slow ones, in about three minutes: pytest tests/search/test_shared_study.py -m slow -n 0
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from postgres import BINARIES, PASSWORD, Postgres
from service.shared_sweeps import METRIC, SMALL, sweep
from tiny_sweeps import folder_of, records, sweep_command, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.search import sharing
from dtr_ray.search.database import database_url
from dtr_ray.search.journal import TrialRecord, read_events, replay
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training.reports import Report

ROOT = Path(__file__).parents[2]
needs_postgres = pytest.mark.skipif(BINARIES is None, reason="needs Debian's postgresql")


@pytest.fixture
def address(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """An empty database's, with the password."""
    return postgres.make_database(f"db{abs(hash(request.node.name))}")


def opened(config: SweepConfig, folder: Path) -> SweepState:
    folder.mkdir(exist_ok=True)
    save_config(config, folder)
    return SweepState(config, folder)


def next_of(state: SweepState) -> TrialRecord:
    trial = state.next_trial()
    assert isinstance(trial, TrialRecord)
    return trial


def complete(state: SweepState, trial: TrialRecord) -> None:
    state.report(trial.trial_id, Report(400, {METRIC: 5.0}, "checkpoints/00000400", "g.png"))
    state.finish(trial.trial_id, "completed")


def trials_of(address: str, name: str = "all") -> list[optuna.trial.FrozenTrial]:
    """Those of a study that are not withdrawn, as anybody reads them."""
    study = optuna.load_study(
        study_name=name, storage=database_url(address).render_as_string(hide_password=False)
    )
    return [t for t in study.trials if "dtr_ray.withdrawn" not in t.user_attrs]


def distinct(params: list[dict[str, Any]]) -> int:
    return len({json.dumps(p, sort_keys=True) for p in params})


class Driver:
    def __init__(self, config: SweepConfig, folder: Path, step_s: float = 0.02) -> None:
        self.folder, self._config = folder, config
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        self._command = [
            sys.executable,
            str(ROOT / "tests/driver.py"),
            str(folder / "config.json"),
            str(folder),
        ]
        self._command.append(str(step_s))

    def start(self) -> None:
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PGPASSWORD": PASSWORD},
            )

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def trials(self) -> dict[str, TrialRecord]:
        return replay(read_events(self.folder / "journal.jsonl"))


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_postgres
def test_two_sweeps_of_one_seed_share_out_a_small_space_and_find_its_end(address, tmp_path):
    points = [{"routing.alpha": a, "weighting.name": "p2"} for a in (1, 2)]
    search = {"num_trials": 9, "num_startup_trials": 4, "seed": 3, "starting_points": points}
    states = [opened(sweep(address, n, space=SMALL, search=search), tmp_path / n) for n in ("one", "two")]
    while True:
        found = [state.next_trial() for state in states]
        for state, trial in zip(states, found, strict=True):
            if isinstance(trial, TrialRecord):
                complete(state, trial)
        if found == ["finished", "finished"]:
            break
    own = [[t.params for t in state.trials.values()] for state in states]
    # 4 values of alpha times 3 weightings.
    assert len(own[0]) + len(own[1]) == distinct(own[0] + own[1]) == 12
    assert [own[0][0], own[1][0]] == points
    assert len(trials_of(address)) == 12


@needs_postgres
def test_sweeps_that_share_a_list_of_points_run_each_once(address, tmp_path):
    points = [{"routing.alpha": a, "routing.beta": 0.5, "weighting.name": "p2"} for a in (1, 2, 3)]
    search = {"sampler": "points", "starting_points": points}
    first, second = (opened(sweep(address, n, search=search), tmp_path / n) for n in ("one", "two"))
    drawn = [next_of(s).params["routing.alpha"] for s in (first, second, first)]
    assert drawn == [1, 2, 3]
    assert first.next_trial() == second.next_trial() == "finished"


@needs_postgres
def test_of_two_claims_at_the_same_moment_the_later_is_withdrawn(address, tmp_path, monkeypatch):
    """Both have looked at the study before either claims."""
    states = [opened(sweep(address, n, space=SMALL), tmp_path / n) for n in ("one", "two")]
    draw = sharing.SharedSearch._draw
    taken = {"routing.alpha": 1.0, "weighting.name": "p2"}

    def at_once(self, number, trials, seen, attempt=0):
        return dict(taken) if attempt == 0 else draw(self, number, trials, seen, attempt)

    monkeypatch.setattr(sharing.SharedSearch, "_draw", at_once)
    first, second = (next_of(state) for state in states)
    assert first.params == taken
    assert second.params != taken
    complete(states[1], second)
    found = trials_of(address)
    assert [t.params for t in found] == [taken, second.params]
    assert [t.state for t in found] == [TrialState.RUNNING, TrialState.COMPLETE]


@needs_postgres
def test_a_claim_that_a_crash_kept_from_the_journal_is_taken_up_again(address, tmp_path):
    config = sweep(address)
    state = opened(config, tmp_path / "one")
    assert state._shared is not None
    lost = state._shared.next_params("t0000", 0, state.trials)
    again = opened(config, tmp_path / "one")
    assert next_of(again).params == lost
    assert len(trials_of(address)) == 1


@needs_postgres
def test_each_sweep_learns_from_the_others_trials(address, tmp_path, monkeypatch):
    first, second = (opened(sweep(address, n), tmp_path / n) for n in ("one", "two"))
    for _ in range(3):
        complete(first, next_of(first))
    seen: list[Any] = []
    suggest = second._suggester.suggest_beside
    monkeypatch.setattr(
        second._suggester, "suggest_beside", lambda others, *a: seen.append(others) or suggest(others, *a)
    )
    next_of(second)
    assert [t.state for t in seen[0]] == [TrialState.COMPLETE] * 3
    assert [t.value for t in seen[0]] == [5.0] * 3


@needs_postgres
def test_a_shared_study_is_for_sweeps_of_one_search(address, tmp_path):
    opened(sweep(address), tmp_path / "one")
    with pytest.raises(ValueError, match=r"'all' is of another search .*routing\.beta"):
        opened(sweep(address, "two", space=SMALL), tmp_path / "two")
    with pytest.raises(ValueError, match="another sweep's"):
        opened(sweep(address, "all", study_name=None), tmp_path / "three")
    opened(sweep(address, "own", study_name=None), tmp_path / "four")
    with pytest.raises(ValueError, match="one sweep's own"):
        opened(sweep(address, "five", study_name="own"), tmp_path / "five")
    for refused in ("two", "three", "five"):
        assert not [e for e in read_events(tmp_path / refused / "journal.jsonl") if e["event"] == "trial"]


def test_a_study_to_be_shared_needs_a_database():
    with pytest.raises(ValueError, match="set storage"):
        SweepConfig.from_dict({**sweep("sqlite:///a.db").to_dict(), "storage": {"study_name": "all"}})


@needs_postgres
def test_new_trials_wait_for_a_database_that_is_away_and_go_on_when_it_is_back(
    postgres, address, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(sharing, "_RETRY_S", 0.0)
    state = opened(sweep(address), tmp_path / "one")
    assert state._shared is not None
    state._shared._retry_s = 0.0
    first = next_of(state)
    postgres.stop()
    assert state.next_trial() == state.next_trial() == "wait"
    complete(state, first)
    postgres.start()
    second = next_of(state)
    assert [t.state for t in trials_of(address)] == [TrialState.COMPLETE, TrialState.RUNNING]
    # An outage beyond all patience stops nothing.
    postgres.kill()
    state._shared._patience_s = 0.0
    third = next_of(state)
    for trial in (second, third):
        complete(state, trial)
    postgres.start()
    state.close()
    assert [t.state for t in trials_of(address)] == [TrialState.COMPLETE] * 3
    assert distinct([t.params for t in trials_of(address)]) == 3
    assert caplog.text.count("new trials wait") == 2
    assert PASSWORD not in caplog.text


@needs_postgres
@pytest.mark.slow
def test_a_sweep_alone_goes_on_without_its_database(postgres, address, tmp_path):
    state = opened(sweep(address, study_name=None), tmp_path / "one")
    postgres.stop()
    for _ in range(2):
        complete(state, next_of(state))
    postgres.start()
    state.close()
    assert [t.state for t in trials_of(address, "one")] == [TrialState.COMPLETE] * 2


@needs_postgres
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_drivers_share_a_study_through_an_outage_of_a_minute_and_a_kill(postgres, address, tmp_path):
    """Two processes, one seed, one space; the database is killed and refuses connections for 60 s."""
    name = address.rpartition("/")[2]
    search = {"num_trials": 60, "num_startup_trials": 10, "seed": 3}
    space = {**SMALL, "routing.beta": {"type": "quniform", "low": 0.1, "high": 1.0, "step": 0.1}}
    stopping = {"name": "asha", "grace_steps": 100, "reduction_factor": 2}
    drivers = [
        Driver(
            sweep(postgres.url(name, None), n, space=space, search=search, early_stopping=stopping),
            tmp_path / n,
        )
        for n in ("one", "two")
    ]
    try:
        for driver in drivers:
            driver.start()
        wait_for(lambda: all(len(driver.trials) >= 8 for driver in drivers))
        postgres.kill()
        time.sleep(30)
        drivers[1].process.send_signal(signal.SIGKILL)
        drivers[1].process.wait()
        time.sleep(30)
        postgres.start()
        drivers[1].start()
        for driver in drivers:
            assert driver.process.wait(150) == 0, driver.output
    finally:
        for driver in drivers:
            driver.process.kill()
    own = [driver.trials for driver in drivers]
    assert [len(trials) for trials in own] == [60, 60]
    # 4 values of alpha, 3 weightings, 10 values of beta: all of them.
    assert distinct([t.params for trials in own for t in trials.values()]) == 120
    found = trials_of(address)
    states = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned"}
    assert Counter(states[t.state] for t in found) == Counter(t.status for ts in own for t in ts.values())
    for driver, trials in zip(drivers, own, strict=True):
        mine = (driver.folder / "identity").read_text()
        for frozen in (t for t in found if t.user_attrs["dtr_ray.sweep_id"] == mine):
            record = trials[frozen.user_attrs["dtr_ray.trial_id"]]
            assert frozen.params == record.params
            assert sorted(frozen.intermediate_values) == list(record.reports)
        assert "new trials wait for the study's database" in driver.output
        assert PASSWORD not in driver.output
    print({d.folder.name: d.output.count("waits") for d in drivers}, len(found), "trials in the study")


@needs_postgres
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_real_sweep_waits_out_a_database_that_is_away_between_its_trials(postgres, address, tmp_path):
    """One trial at a time: while the database is away none runs, and Ray Tune has nothing to do."""
    config = tiny_sweep(
        tmp_path,
        search__num_trials=3,
        storage__study=postgres.url(address.rpartition("/")[2], None),
        storage__study_name="all",
        resources__max_concurrent=1,
    )
    folder = folder_of(config)
    with sweep_command(config, PGPASSWORD=PASSWORD) as command:
        wait_for(lambda: (folder / "journal.jsonl").exists() and records(folder), 200)
        postgres.kill()
        wait_for(lambda: "new trials wait" in command.output, 200)
        time.sleep(30)
        assert [t.status for t in records(folder).values()] != ["running"]
        assert command.process.poll() is None
        postgres.start()
        assert command.wait(200) == 0, command.output
        assert PASSWORD not in command.output
    found = trials_of(address)
    states = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned"}
    assert [states[t.state] for t in found] == [t.status for t in records(folder).values()]
    assert len(found) == 3
