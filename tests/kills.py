"""Kills sweeps and resumes them, and compares what they leave behind with an undisturbed run."""

import csv
import itertools
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from tiny_sweeps import (
    TIMES,
    SweepCommand,
    attempts,
    expected_log_steps,
    folder_of,
    read_json,
    records,
    snapshot,
    sweep_command,
    timeless,
)

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import read_events
from dtr_ray.service.attempts import read_heartbeat
from dtr_ray.training.state import TrainingState

SIGNALS: dict[str, tuple[int, Callable[[SweepCommand], list[int]]]] = {
    "kill driver": (signal.SIGKILL, lambda command: [command.process.pid]),
    # Ray's daemons too, but no worker: those are in groups of their own.
    "kill group": (signal.SIGKILL, lambda command: [-command.process.pid]),
    "kill all": (signal.SIGKILL, lambda command: list(command.processes())),
    "Ctrl-C": (signal.SIGINT, lambda command: [-command.process.pid]),
    "SIGTERM": (signal.SIGTERM, lambda command: [command.process.pid]),
}


STATES = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
"""Optuna's words for how a trial has ended."""


@dataclass
class Round:
    """One interruption."""

    how: str
    after_s: float
    """Seconds since the process was started."""
    running: str
    """What trials were doing."""
    code: int
    output: str
    gone_s: float | None = None
    """Seconds until the last of its processes was gone; None where that was not waited for."""


def run_to_the_end(config: SweepConfig, *options: str, **environment: str) -> str:
    """Runs the command, which must succeed; returns what it printed."""
    with sweep_command(config, *options, **environment) as command:
        assert command.wait(300.0) == 0, command.output
        return command.output


class Interrupter:
    """Starts or resumes a sweep, and sends it signals at random moments."""

    def __init__(self, config: SweepConfig, seed: int, training_s: float = 2.0, **environment: str) -> None:
        """`training_s`: seconds at most that trials train in a round; all rounds must not end the sweep."""
        self._environment = environment
        self._config = config
        self._training_s = training_s
        self._rng = random.Random(seed)
        self._killed: list[SweepCommand] = []
        """Commands whose processes were left to die by themselves."""

    def __call__(self, how: str, *, wait_gone: bool) -> Round:
        """One interruption; looks whether all of it ends, or leaves that to the next one to cope with."""
        command = SweepCommand(self._config, "--resume", **self._environment)
        try:
            self._let_run(command)
            assert command.process.poll() is None, f"it has ended by itself: {command.output}"
            running = ", ".join(_doing(folder_of(self._config))) or "nothing yet"
            after_s = time.monotonic() - command.started
            signum, receivers = SIGNALS[how]
            command.signal(signum, receivers(command))
            found = Round(how, after_s, running, command.wait(30.0), command.output)
            self._killed.append(command)
            if wait_gone:
                found.gone_s = self._wait_gone(but_agents=signum == signal.SIGKILL)
        except BaseException:
            self._killed.append(command)
            self.end()
            raise
        return found

    def end(self) -> None:
        """Kills what may be left."""
        for command in self._killed:
            command.end()

    def _let_run(self, command: SweepCommand) -> None:
        folder = folder_of(self._config)
        # Now and then anywhere in its start, before a trial trains.
        starting_s = self._rng.uniform(0.0, 10.0) if self._rng.random() < 0.25 else math.inf
        before, started = _steps_made(folder), time.monotonic()
        while _steps_made(folder) == before and command.process.poll() is None:
            if time.monotonic() - started > starting_s:
                return
            time.sleep(0.01)
        time.sleep(self._rng.uniform(0.0, self._training_s))

    def _wait_gone(self, *, but_agents: bool) -> float:
        started = time.monotonic()
        for command in self._killed:
            command.wait_gone(60.0, but_agents=but_agents)
        gone_s = time.monotonic() - started
        left = snapshot(folder_of(self._config))
        time.sleep(0.5)
        assert snapshot(folder_of(self._config)) == left, "something still writes"
        return gone_s


def _steps_made(folder: Path) -> int:
    trials = (folder / "trials").glob("t*")
    return sum(attempt.num_steps for trial in trials for attempt in attempts(folder, trial.name))


def _doing(folder: Path) -> Iterator[str]:
    for trial in records(folder).values():
        if trial.status == "running":
            beat = read_heartbeat(folder / "trials" / trial.trial_id)
            yield f"{trial.trial_id} {beat['phase']} {beat['step']}" if beat else f"{trial.trial_id} starting"


def check_same(config: SweepConfig, other: SweepConfig) -> None:
    """Two sweeps have run the same trials with the same parameters, decisions, values and files."""
    one, two = folder_of(config), folder_of(other)
    assert [timeless(r) for r in records(one).values()] == [timeless(r) for r in records(two).values()]
    assert _timeless_rows(one) == _timeless_rows(two)
    for name in ("trial_id", "metric", "mode", "value", "step", "protocol", "config", "checkpoint"):
        assert read_json(one / "best.json")[name] == read_json(two / "best.json")[name]
    assert _study(config) == _study(other)


def _timeless_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def _study(config: SweepConfig, address: str | None = None) -> list[tuple[Any, ...]]:
    study = optuna.load_study(
        study_name=config.name, storage=address or f"sqlite:///{folder_of(config) / 'study.db'}"
    )
    return [(t.number, t.state, t.params, t.values, t.intermediate_values) for t in study.trials]


def check_accounts(config: SweepConfig, study: str | None = None) -> None:
    """Every suggested trial is there once and has ended once; none is missing.

    `study` is the address of its study, where that is not a file in the sweep's folder.
    """
    folder = folder_of(config)
    events = read_events(folder / "journal.jsonl")
    count = config.search.num_trials
    assert [e["number"] for e in events if e["event"] == "trial"] == list(range(count))
    ends = Counter(e["id"] for e in events if e["event"] == "end" or (e["event"] == "report" and e["stop"]))
    assert ends == dict.fromkeys(records(folder), 1)
    reports = Counter((e["id"], e["step"]) for e in events if e["event"] == "report")
    assert set(reports.values()) == {1}
    told = _study(config, study)
    assert [number for number, *_ in told] == list(range(count))
    assert [state.name for _, state, *_ in told] == [STATES[t.status] for t in records(folder).values()]
    for trial in records(folder).values():
        every, total = config.trial.evaluation.every_steps, config.trial.training.num_steps
        assert trial.status in ("completed", "pruned")
        assert (trial.status == "completed") == (trial.last_step == total)
        first = 0 if trial.number == 0 else every
        assert sorted(trial.reports) == list(range(first, trial.last_step + 1, every))


def check_results(config: SweepConfig) -> None:
    """trials.csv and best.json say what the journal does, and the best checkpoint can be loaded."""
    folder, metric = folder_of(config), config.objective
    trials = records(folder)
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["status"], int(row["steps"])) for row in rows] == [
        (trial.trial_id, trial.status, trial.last_step) for trial in trials.values()
    ]
    bests = {trial.number: trial.best(metric) for trial in trials.values() if trial.status != "failed"}
    assert {
        int(row["id"].removeprefix("t")): float(row[f"{metric}.best"])
        for row in rows
        if row[f"{metric}.best"]
    } == {number: best[1] for number, best in bests.items() if best is not None}
    value, number, step = min(
        (best[1], number, best[0]) for number, best in bests.items() if best is not None
    )
    found, winner = read_json(folder / "best.json"), f"t{number:04d}"
    assert (found["trial_id"], found["value"], found["step"]) == (winner, value, step)
    trial = config.trial_config(trials[winner].params)
    state = TrainingState.build(trial, torch.device("cpu"))
    state.load(folder / found["checkpoint"], trial)
    assert state.step == step


@dataclass(frozen=True)
class Again:
    """Steps that were made again."""

    trial_id: str
    attempt: int
    """That made them."""
    steps: int


def made_again(config: SweepConfig) -> Iterator[Again]:
    """What each process that went on with a trial has made again; none has left a step out."""
    folder = folder_of(config)
    for trial_id, trial in records(folder).items():
        made = [a for a in attempts(folder, trial_id) if a.num_steps]
        assert made[0].from_step == 0
        assert made[-1].to_step == trial.last_step
        for before, after in itertools.pairwise(made):
            assert before.to_step is not None
            assert after.from_step is not None
            assert before.to_step >= after.from_step
            yield Again(trial_id, after.attempt, before.to_step - after.from_step)


def check_steps(config: SweepConfig) -> int:
    """No interruption cost more than a checkpoint's interval; returns the steps that were made again."""
    found = [again.steps for again in made_again(config)]
    assert max(found, default=0) <= config.trial.checkpoint_every_steps
    return sum(found)


def check_mlflow(config: SweepConfig, uri: str | None = None) -> None:
    """One run for the sweep and one a trial, with every step of every metric once."""
    folder = folder_of(config)
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder.parent / 'mlflow.db'}")
    parent, children = runs_of(client, config.name)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["dtr_ray.status"] == "completed"
    trials = records(folder)
    assert sorted(children) == sorted(trials)
    for trial_id, run in children.items():
        trial = trials[trial_id]
        assert run.data.tags["dtr_ray.status"] == trial.status
        assert (
            run.info.status == {"completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}[trial.status]
        )
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        assert [m.step for m in by_step(history["train_loss"])] == expected_log_steps(config, trial)
        for name in {*TIMES, *(name for metrics in trial.reports.values() for name in metrics)}:
            values = {m.step: m.value for m in history[name]}
            assert len(values) == len(history[name])
            assert values == {s: metrics[name] for s, metrics in trial.reports.items() if name in metrics}


def count_mlflow(config: SweepConfig, uri: str | None = None) -> tuple[int, int]:
    """Runs that are there more than once, and values of metrics that are missing, doubled or wrong."""
    folder = folder_of(config)
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(config.name)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    keys = Counter(run.data.tags["dtr_ray.run_key"] for run in runs)
    found: Counter[tuple[str, str, int]] = Counter()
    for run in runs:
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            found.update((run.data.tags["dtr_ray.run_key"], name, m.step) for m in history)
    wanted: Counter[tuple[str, str, int]] = Counter()
    for trial_id, trial in records(folder).items():
        wanted.update((trial_id, "train_loss", step) for step in expected_log_steps(config, trial))
        wanted.update((trial_id, name, step) for step, values in trial.reports.items() for name in values)
    names = {name for _, name, _ in wanted}
    found = Counter({key: count for key, count in found.items() if key[1] in names})
    lost, doubled = (wanted - found).total(), (found - wanted).total()
    return sum(keys.values()) - len(keys), lost + doubled


def by_step(history: list[Any]) -> list[Any]:
    return sorted(history, key=lambda metric: metric.step)


def runs_of(client: MlflowClient, experiment: str) -> tuple[Run, dict[str, Run]]:
    """The sweep's run and those of its trials by trial id; each trial has one run, and the sweep has one."""
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags["dtr_ray.kind"] == "sweep"]
    assert len(parents) == 1
    children = [run for run in runs if run.data.tags["dtr_ray.kind"] == "trial"]
    assert len(children) + 1 == len(runs)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parents[0].info.run_id}
    ids = [run.data.tags["dtr_ray.trial_id"] for run in children]
    assert len(set(ids)) == len(ids)
    return parents[0], dict(zip(ids, children, strict=True))
