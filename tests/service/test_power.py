"""A sweep's machine loses its power again and again: what was not synced is gone, the sweep loses nothing.

Takes about ten minutes on two cores, and prints a table of the cuts:

    python -m pytest -m slow tests/service/test_power.py -n 0 -s --timeout 3600
"""

import random
from pathlib import Path

import pytest
from kills import Interrupter, check_accounts, check_mlflow, check_same, check_steps, run_to_the_end
from power import Lost, PowerLog, power_log
from preloaded import can_build
from rich.console import Console
from rich.table import Table
from tiny_sweeps import folder_of, read_json, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.training.checksums import find_damage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not can_build(), reason="needs gcc"),
]

CHANGES = {
    "search__num_trials": 8,
    "search__num_startup_trials": 4,
    "trial__training__num_steps": 120,
    "trial__training__batch_size": 192,
    "trial__training__log_every_steps": 5,
    "trial__training__checkpoint_every_steps": 20,
    "trial__evaluation__every_steps": 60,
    "early_stopping__grace_steps": 60,
}


def cut_over_and_over(config: SweepConfig, power: PowerLog, seed: int, worst: list[bool]) -> list[Lost]:
    """Kills all, takes what was not synced, resumes: as often as `worst` says how; then runs to the end."""
    rng, lost = random.Random(seed), []
    interrupt = Interrupter(config, seed, 3.0, **power.env)
    try:
        for how in worst:
            interrupt("kill all", wait_gone=True)
            lost.append(power.cut(rng, worst=how))
    finally:
        interrupt.end()
    run_to_the_end(config, "--resume", **power.env)
    lost.append(power.cut(rng, worst=True))
    return lost


def show(title: str, worst: list[bool], lost: list[Lost], again: int, capsys: pytest.CaptureFixture[str]):
    table = Table(title=title, caption=f"{again} training steps were made again in all")
    for heading in ("cut", "how", "names lost or back", "files of other content", "among them"):
        table.add_column(heading)
    for number, (how, one) in enumerate(zip([*worst, True], lost, strict=True), 1):
        which = ", ".join(sorted({Path(n).name for n in one.contents}))[:60]
        table.add_row(
            str(number), "worst" if how else "random", str(len(one.names)), str(len(one.contents)), which
        )
    with capsys.disabled():
        Console(width=130).print(table)


def check_all(config: SweepConfig) -> None:
    check_accounts(config)
    check_mlflow(config)
    folder = folder_of(config)
    best = read_json(folder / "best.json")
    assert find_damage(folder / best["checkpoint"]) is None


@pytest.mark.parametrize("how", ["worst", "random"])
def test_one_trial_at_a_time_ends_as_if_the_power_had_never_failed(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str], how: str
):
    changes = CHANGES | {"resources__max_concurrent": 1}
    undisturbed, config = (tiny_sweep(tmp_path / name, **changes) for name in ("undisturbed", "cut"))
    run_to_the_end(undisturbed)
    Path(config.storage.output).mkdir()
    with power_log(Path(config.storage.output)) as power:
        worst = [how == "worst"] * 6
        lost = cut_over_and_over(config, power, 1, worst)
    show(f"one trial at a time, {how}", worst, lost, check_steps(config), capsys)
    check_same(config, undisturbed)
    check_all(config)


def test_two_trials_at_a_time_account_for_every_trial_and_every_metric_once(
    tmp_path: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_sweep(tmp_path / "cut", **CHANGES | {"resources__max_concurrent": 2})
    Path(config.storage.output).mkdir()
    with power_log(Path(config.storage.output)) as power:
        worst = [n % 2 == 0 for n in range(6)]
        lost = cut_over_and_over(config, power, 2, worst)
    show("two trials at a time", worst, lost, check_steps(config), capsys)
    check_all(config)
