"""A sweep that is interrupted, killed, or complete already, and goes on with --resume."""

import csv
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from kills import Interrupter, Round, check_accounts, check_mlflow, check_same, check_steps, run_to_the_end
from tiny_sweeps import METRIC, folder_of, read_json, records, snapshot, sweep_command, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.service.sweep import run_sweep

pytestmark = pytest.mark.timeout(300)

CHANGES = {
    "resources__max_concurrent": 1,
    "search__num_trials": 4,
    "trial__training__num_steps": 60,
    "trial__evaluation__every_steps": 20,
    "early_stopping__grace_steps": 20,
    "trial__training__batch_size": 96,
    "trial__evaluation__proxy": {"until_step": 20, "num_samples": 16},
}
PROXY = "proxy_fd_efficientnet_lite0_16"


@dataclass(frozen=True)
class Interrupted:
    """A sweep that was ended by Ctrl-C and SIGKILL, and then run to its end."""

    config: SweepConfig
    rounds: dict[str, Round]
    output: str
    """What the last --resume printed."""


# Of the session, since the tests below are not run in one go: those that share a Ray come last.
@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Interrupted:
    config = tiny_sweep(tmp_path_factory.mktemp("interrupted"), **CHANGES)
    interrupt = Interrupter(config, seed=1, training_s=0.5)
    hows = ("Ctrl-C", "kill all")
    rounds = {how: interrupt(how, wait_gone=how != "kill all") for how in hows}
    output = run_to_the_end(config, "--resume")
    interrupt.end()
    return Interrupted(config, rounds, output)


def test_an_interrupt_ends_everything_within_seconds_and_prints_the_command_that_goes_on(
    interrupted: Interrupted,
):
    found = interrupted.rounds["Ctrl-C"]
    assert found.code == 130
    assert found.gone_s is not None
    assert found.gone_s < 15.0
    assert "Traceback" not in found.output
    lines = found.output.splitlines()
    assert lines[-2] == "interrupted; everything is kept. To go on:"
    words = shlex.split(lines[-1])
    assert words[:3] == ["python", "-m", "dtr_ray.sweep"]
    assert words[-1] == "--resume"


def test_a_sweep_interrupted_and_killed_equals_an_undisturbed_one(
    interrupted: Interrupted, ray_cluster: str, tmp_path: Path
):
    assert interrupted.rounds["kill all"].code == -9
    undisturbed = tiny_sweep(tmp_path, **CHANGES)
    run_sweep(undisturbed, folder_of(undisturbed))
    check_same(interrupted.config, undisturbed)
    assert check_steps(undisturbed) == 0


def test_an_interrupted_sweep_accounts_for_every_trial_and_step_once(interrupted: Interrupted):
    check_accounts(interrupted.config)
    check_mlflow(interrupted.config)
    check_steps(interrupted.config)


def test_a_proxy_decides_early_and_the_best_is_of_the_full_metric(interrupted: Interrupted):
    folder = folder_of(interrupted.config)
    trials = records(folder)
    for trial in trials.values():
        kinds = {step: PROXY if step <= 20 else METRIC for step in trial.reports}
        assert {step: {PROXY, METRIC} & set(v) for step, v in trial.reports.items()} == {
            step: {name} for step, name in kinds.items()
        }
        assert all(trial.protocols[step]["metric"] == name for step, name in kinds.items())
    stopped = [trial for trial in trials.values() if trial.last_step == 20]
    assert stopped
    assert all("at rung 20" in trial.reason for trial in stopped)
    best = read_json(folder / "best.json")
    full = {i: t.best(METRIC) for i, t in trials.items() if t not in stopped}
    assert (best["step"], best["value"]) == full[best["trial_id"]] == min(full.values(), key=lambda v: v[1])
    assert best["protocol"]["metric"] == METRIC
    assert best["protocol"]["data.identity"].startswith("digits-8-")
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert all(rows[i][f"{PROXY}.best"] for i in trials)
    assert {i for i in trials if not rows[i][f"{METRIC}.best"]} == {t.trial_id for t in stopped}
    told = f"ended with a {PROXY} alone, without a {METRIC}: {len(stopped)} of 4 trials"
    assert told in interrupted.output


def test_resuming_a_complete_sweep_prints_its_summary_without_ray(interrupted: Interrupted):
    folder = folder_of(interrupted.config)
    before = {
        name: state for name, state in snapshot(folder).items() if name.startswith(("trials/", "tracking/"))
    }
    # There is no Ray at that address: to ask for it would be an error.
    output = run_to_the_end(interrupted.config, "--resume", RAY_ADDRESS="127.0.0.1:1")
    assert "all trials had ended before" in output
    table = [line for line in output.splitlines() if line.startswith("  t000")]
    assert table == [line for line in interrupted.output.splitlines() if line.startswith("  t000")]
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before


def test_a_sweep_is_not_run_over_another(interrupted: Interrupted):
    with sweep_command(interrupted.config) as command:
        assert command.wait(60.0) == 2
        assert "holds a sweep already: --resume goes on with it" in command.output


@pytest.mark.slow
def test_a_resumed_sweep_may_be_given_more_trials_but_no_other_space(
    interrupted: Interrupted, tmp_path: Path, ray_cluster: str
):
    shutil.copytree(Path(interrupted.config.storage.output), tmp_path, dirs_exist_ok=True)
    other = tiny_sweep(
        tmp_path, **CHANGES | {"space": {"routing.beta": {"type": "uniform", "low": 0.5, "high": 1.0}}}
    )
    with pytest.raises(ValueError, match="space differs"):
        run_sweep(other, folder_of(other), resume=True)
    before = records(folder_of(interrupted.config))
    more = tiny_sweep(tmp_path, **CHANGES | {"search__num_trials": 6})
    outcome = run_sweep(more, folder_of(more), resume=True)
    assert outcome.error is None
    after = records(folder_of(more))
    assert list(after) == [f"t{number:04d}" for number in range(6)]
    assert {trial_id: after[trial_id] for trial_id in before} == before
    check_accounts(more)
    check_mlflow(more)
