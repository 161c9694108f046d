"""A sweep is killed ten times at random moments, and resumed; nothing is lost, and nothing is done twice.

Takes about ten minutes on two cores, and prints a table of the kills:

    python -m pytest -m slow tests/service/test_kill.py -s --timeout 3600
"""

from pathlib import Path

import pytest
from kills import Interrupter, Round, check_accounts, check_mlflow, check_same, check_steps, run_to_the_end
from rich.console import Console
from rich.table import Table
from tiny_sweeps import folder_of, tiny_sweep

from dtr_ray.config import SweepConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_KILLS = 10
CHANGES = {
    "search__num_trials": 16,
    "search__num_startup_trials": 5,
    "trial__training__num_steps": 240,
    "trial__training__batch_size": 192,
    "trial__training__log_every_steps": 5,
    "trial__training__checkpoint_every_steps": 20,
    "trial__evaluation__every_steps": 60,
    "early_stopping__grace_steps": 60,
}


def kill_over_and_over(config: SweepConfig, seed: int, num_kills: int = NUM_KILLS) -> list[Round]:
    """Kills the driver, its group or everything, resumes at once or after a look; then runs to the end."""
    interrupt, rounds = Interrupter(config, seed), []
    for number in range(num_kills):
        how = ("kill driver", "kill all", "kill group", "kill all")[number % 4]
        rounds.append(interrupt(how, wait_gone=number % 3 != 1))
    run_to_the_end(config, "--resume")
    interrupt.end()
    assert [found.code for found in rounds] == [-9] * num_kills
    return rounds


def print_rounds(title: str, rounds: list[Round], again: int, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=title)
    for heading in ("kill", "of", "after", "while", "its processes gone after"):
        table.add_column(heading)
    for number, found in enumerate(rounds, 1):
        gone = "resumed at once" if found.gone_s is None else f"{found.gone_s:.1f} s"
        of = found.how.removeprefix("kill ")
        table.add_row(str(number), of, f"{found.after_s:.1f} s", found.running, gone)
    table.caption = f"{again} training steps were made again in all"
    with capsys.disabled():
        Console(width=110).print(table)


def test_one_trial_at_a_time_ends_with_the_same_trials_decisions_and_values(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    changes = CHANGES | {"resources__max_concurrent": 1}
    undisturbed, config = (tiny_sweep(tmp_path / name, **changes) for name in ("undisturbed", "killed"))
    run_to_the_end(undisturbed)
    rounds = kill_over_and_over(config, seed=1)
    print_rounds("one trial at a time", rounds, check_steps(config), capsys)
    check_same(config, undisturbed)
    assert check_steps(undisturbed) == 0
    for each in (config, undisturbed):
        check_accounts(each)
        check_mlflow(each)


def test_two_trials_at_a_time_account_for_every_suggested_trial_once(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_sweep(tmp_path, **CHANGES | {"resources__max_concurrent": 2, "search__num_trials": 24})
    rounds = kill_over_and_over(config, seed=2)
    print_rounds("two trials at a time", rounds, check_steps(config), capsys)
    check_accounts(config)
    check_mlflow(config)
    assert (folder_of(config) / "best.json").exists()


def test_trials_of_two_workers_end_with_the_same_values(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    changes = CHANGES | {"resources__workers_per_trial": 2, "search__num_trials": 4}
    undisturbed, config = (tiny_sweep(tmp_path / name, **changes) for name in ("undisturbed", "killed"))
    run_to_the_end(undisturbed)
    rounds = kill_over_and_over(config, seed=3, num_kills=4)
    print_rounds("trials of two workers", rounds, check_steps(config), capsys)
    check_same(config, undisturbed)
    check_accounts(config)
    check_mlflow(config)
