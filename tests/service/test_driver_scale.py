"""A sweep of simulated trials: nothing is lost, and it decides as a driver that keeps nothing would."""

import csv
import importlib.util
import math
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from tiny_sweeps import ROOT, read_json

from dtr_ray.config.space import active_parameters
from dtr_ray.search.frozen import frozen_trial
from dtr_ray.search.journal import TrialRecord, apply, read_events, replay
from dtr_ray.search.stopping import rungs
from dtr_ray.search.study import Suggester, _suggest
from dtr_ray.service.mlflow_client import connect

NUM_TRIALS, NUM_GPUS = 60, 16


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("driver_scale", ROOT / "benchmarks" / "driver_scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def found(
    scale: ModuleType, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A finished sweep; it may hold open fewer files than it has trials."""
    output = tmp_path_factory.mktemp("scale")
    shutil.copy(empty_store, output)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + NUM_GPUS + 32, hard))
    try:
        yield scale.run(NUM_TRIALS, output, NUM_GPUS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_trial_ends_once_and_the_best_is_the_smallest(scale: ModuleType, found: dict[str, Any]) -> None:
    trials, folder = found["outcome"].state.trials, found["folder"]
    assert found["outcome"].error is None
    assert found["at_once"] == NUM_GPUS
    assert list(trials) == [f"t{number:04d}" for number in range(NUM_TRIALS)]
    statuses = Counter(trial.status for trial in trials.values())
    assert statuses["failed"] == 1
    assert statuses["completed"] >= 3
    assert statuses["pruned"] >= 20
    assert statuses["running"] == 0
    events = read_events(folder / "journal.jsonl")
    ends = Counter(e["id"] for e in events if e["event"] == "end" or (e["event"] == "report" and e["stop"]))
    assert ends == dict.fromkeys(trials, 1)
    values = {
        (t.trial_id, step): scale.distance(t.params, t.number, step)
        for t in trials.values()
        if t.status != "failed"
        for step in t.reports
    }
    best = read_json(folder / "best.json")
    assert ((best["trial_id"], best["step"]), best["value"]) == min(values.items(), key=lambda item: item[1])
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["status"]) for row in rows] == [(t.trial_id, t.status) for t in trials.values()]
    for row, trial in zip(rows, trials.values(), strict=True):
        own = [value for (trial_id, _), value in values.items() if trial_id == trial.trial_id]
        assert row[f"{scale.METRIC}.best"] == (str(min(own)) if own else "")


def test_mlflow_and_the_study_hold_every_trial_once(scale: ModuleType, found: dict[str, Any]) -> None:
    trials, outcome = found["outcome"].state.trials, found["outcome"]
    assert outcome.records_waiting == 0
    client = MlflowClient(tracking_uri=outcome.tracking_uri)
    experiment = client.get_experiment_by_name("scale")
    runs = client.search_runs([experiment.experiment_id], "tags.`dtr_ray.kind` = 'trial'")
    assert {r.data.tags["dtr_ray.trial_id"]: r.data.tags["dtr_ray.status"] for r in runs} == {
        t.trial_id: t.status for t in trials.values()
    }
    assert len(runs) == NUM_TRIALS
    study = optuna.load_study(study_name="scale", storage=f"sqlite:///{found['folder'] / 'study.db'}")
    names = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    assert [(t.state.name, t.intermediate_values) for t in study.trials] == [
        (names[t.status], {step: values[scale.METRIC] for step, values in t.reports.items()})
        for t in trials.values()
    ]


def plainly_suggested(found: dict[str, Any], trials: dict[str, TrialRecord]) -> dict[str, Any]:
    """What a study that is made anew from all trials suggests."""
    config = found["config"]
    suggester = Suggester(config.search, config.space, config.trial.evaluation)
    study = optuna.create_study(sampler=suggester._sampler((len(trials),), None))
    study.add_trials([frozen_trial(t, config.space, config.trial.evaluation) for t in trials.values()])
    trial = study.ask()
    return active_parameters(config.space, lambda key, parameter: _suggest(trial, key, parameter))


def plainly_stopped(
    found: dict[str, Any], metric: str, event: dict[str, Any], trials: dict[str, TrialRecord]
) -> bool:
    """ASHA as its paper says it, from all reports so far."""
    rule, step = found["config"].early_stopping, event["step"]
    if step not in rungs(rule, found["config"].trial.training.num_steps):
        return False
    others = [t.reports[step][metric] for t in trials.values() if step in t.reports]
    mine = event["metrics"][metric]
    ranked = sorted([*others, mine])
    return bool(mine > ranked[max(1, math.floor(len(ranked) / rule.reduction_factor)) - 1])


def test_every_decision_is_that_of_a_driver_that_keeps_nothing(
    scale: ModuleType, found: dict[str, Any]
) -> None:
    """The journal is replayed: what was suggested and who was stopped follows from the events before."""
    trials: dict[str, TrialRecord] = {}
    num_suggested = num_stopped = 0
    for event in read_events(found["folder"] / "journal.jsonl"):
        if event["event"] == "trial":
            assert event["params"] == plainly_suggested(found, trials)
            num_suggested += 1
        elif event["event"] == "report":
            stopped = plainly_stopped(found, scale.METRIC, event, trials)
            assert (event["stop"] is not None) == stopped
            num_stopped += stopped
        apply(trials, event)
    assert num_suggested == NUM_TRIALS
    assert num_stopped >= 20


def test_a_driver_that_is_killed_half_way_decides_as_one_that_is_not(
    scale: ModuleType, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one trial at a time; with more, the order of reports after a kill is another one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        shutil.copy(empty_store, folder)
    undisturbed = scale.run(8, whole, 1)["outcome"].state.trials
    told = scale.state.SweepState.report

    def killed(state: Any, *args: Any) -> Any:
        if len(read_events(state.folder / "journal.jsonl")) > 15:
            raise KeyboardInterrupt
        return told(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(scale.state.SweepState, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            scale.run(8, broken, 1)
    resumed = scale.run(8, broken, 1)["outcome"].state.trials
    assert [(t.params, t.status, t.reports) for t in resumed.values()] == [
        (t.params, t.status, t.reports) for t in undisturbed.values()
    ]
    assert replay(read_events(broken / "scale" / "journal.jsonl")) == resumed
