"""What a sweep shows: a live table on a terminal, plain lines elsewhere, and a summary at its end."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_sweeps import METRIC, Finished, folder_of, tiny_sweep

from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.names import describe_params, short_names
from dtr_ray.search.state import SweepState
from dtr_ray.service.attempts import AttemptLog
from dtr_ray.service.display import Display, clock
from dtr_ray.service.plan import print_plan
from dtr_ray.service.summary import print_summary
from dtr_ray.training import Report

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(step: int, value: float) -> Report:
    return Report(step, {METRIC: value, "train_seconds": 1.0}, f"checkpoints/{step:08d}", "grid.png")


def next_trial(state: SweepState) -> TrialRecord:
    trial = state.next_trial()
    assert trial != "finished"
    return trial


@pytest.fixture
def state(tmp_path: Path) -> SweepState:
    config = tiny_sweep(tmp_path)
    folder_of(config).mkdir()
    return SweepState(config, folder_of(config))


def play(state: SweepState) -> None:
    """One trial completes, one is stopped early, one fails, and one is on its way."""
    first, second, third, fourth = (next_trial(state) for _ in range(4))
    for step, value in ((10, 800.0), (20, 700.0), (40, 512.3456)):
        state.report(first.trial_id, report(step, value))
    state.finish(first.trial_id, "completed")
    state.report(second.trial_id, report(10, 900.0))
    state.finish(third.trial_id, "failed", "TrainingDivergedError: the loss is nan at step 7")
    folder = state.trial_folder(fourth.trial_id)
    folder.mkdir(parents=True)
    log = AttemptLog(folder)
    log.close()
    (folder / "progress.json").write_text('{"step": 13, "phase": "evaluating", "time": 1.0}')


def test_where_there_is_no_terminal_every_event_is_a_line_without_control_characters(state: SweepState):
    console = Console(file=io.StringIO(), width=40)
    with Display(state, console) as display:
        state.listeners.append(display)
        play(state)
    text = text_of(console)
    assert not CONTROL.search(text)
    lines = text.splitlines()
    assert all(re.match(r"\[\d+:\d\d\] t000\d ", line) for line in lines)
    assert re.search(r"t0000 starts: alpha [\d.]+, beta 0\.\d+, weighting \w+", lines[0])
    assert any(
        re.search(rf"t0000 50% \(step 20/40\), {METRIC} 700, \d:\d\d to its last step", x) for x in lines
    )
    assert any("t0000 completed; 1 completed, 0 stopped early, 0 failed, 3 running of 6" in x for x in lines)
    assert any("t0001 stopped early (900 at rung 10 is not among the best 1 of 2" in x for x in lines)
    assert any("t0002 failed (TrainingDivergedError: the loss is nan at step 7)" in x for x in lines)


def test_the_finished_sweeps_lines_tell_its_whole_story(finished_sweep: Finished):
    lines = finished_sweep.lines.splitlines()
    assert not CONTROL.search(finished_sweep.lines)
    for trial in finished_sweep.outcome.state.trials.values():
        own = [line for line in lines if f" {trial.trial_id} " in line.partition("]")[2][:8]]
        assert len(own) == 1 + len(trial.reports) + 1
        ending = {"completed": "completed; ", "pruned": "stopped early ("}[trial.status]
        assert ending in own[-1]


def test_the_live_table_fits_100_columns_and_cuts_no_heading(state: SweepState, wide: Console):
    play(state)
    wide.print(Display(state, wide).table())
    lines = text_of(wide).splitlines()
    assert max(len(line) for line in lines) <= 100
    heading = next(line for line in lines if "alpha" in line and "step" in line)
    expected = ["trial", "alpha", "beta", "weighting", "gamma", "step", "left", "fd", "status"]
    assert heading.split() == expected
    rows = {line.split()[0]: line for line in lines if line.strip().startswith("t000")}
    assert "…" not in "".join(lines)
    assert {"40/40", "512.3", "completed"} <= set(rows["t0000"].split())
    assert {"10/40", "900", "pruned"} <= set(rows["t0001"].split())
    assert {"0/40", "failed"} <= set(rows["t0002"].split())
    assert {"13/40", "evaluating"} <= set(rows["t0003"].split())
    assert f"fd is {METRIC}" in text_of(wide)


def test_a_terminal_gets_the_table_live_and_no_lines(state: SweepState, wide: Console):
    with Display(state, wide) as display:
        state.listeners.append(display)
        play(state)
    text = text_of(wide)
    assert "\x1b[" in text
    assert "starts:" not in text
    assert "1 completed, 1 stopped early, 1 failed, 1 running of 6; best 512.3 (t0000)" in re.sub(
        r"\s+", " ", text
    )


def test_the_summary_names_the_best_the_spread_the_failures_and_the_next_command(
    finished_sweep: Finished, wide: Console
):
    print_summary(finished_sweep.outcome, wide)
    text = text_of(wide)
    best, *_, worst = finished_sweep.outcome.state.ranked()
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("  t000")]
    assert rows[0] == best[0].trial_id
    assert worst[0].trial_id not in rows
    assert len(rows) == 5
    untrained = finished_sweep.outcome.state.untrained_value
    assert re.search(
        rf"{METRIC}: best {best[2]:.4g}, median of all trials \d+, untrained model {untrained:.4g}", text
    )
    assert re.search(r"importance for \S+ at step 10: (\w+ \d+%(, )?)+", text)
    folder = finished_sweep.folder
    assert f"results     {folder}: trials.csv, best.json, montage.png" in text
    assert f"train best  python -m dtr_ray.train_best {folder}" in text
    assert f"mlflow ui --backend-store-uri sqlite:///{folder.parent / 'mlflow.db'}" in text


def test_a_plan_tells_that_nothing_fits_this_machine_and_is_no_error(tmp_path: Path, wide: Console):
    config = tiny_sweep(tmp_path, resources__gpus_per_worker=64.0)
    print_plan(config, folder_of(config), wide)
    assert "side by side  none on this machine" in text_of(wide)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (["routing.alpha", "routing.beta"], ["alpha", "beta"]),
        (["weighting.name", "weighting.gamma", "weighting.gamma@p2"], ["weighting", "gamma"]),
        (["training.seed", "routing.seed"], ["training.seed", "routing.seed"]),
        (["routing.name", "training.lr"], ["routing", "lr"]),
    ],
)
def test_searched_parameters_have_short_names_that_are_never_the_same(space: list[str], expected: list[str]):
    assert list(short_names(space).values()) == expected


def test_parameters_in_one_line():
    params: dict[str, Any] = {"routing.alpha": 4.0, "weighting.name": "p2"}
    assert describe_params(params, short_names(params)) == "alpha 4, weighting p2"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (86399, "23:59:59")]
)
def test_clock(seconds: float, shown: str):
    assert clock(seconds) == shown
