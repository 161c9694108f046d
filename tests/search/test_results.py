"""trials.csv: the best value of a metric is the one that is better, whichever way that is."""

import csv
from pathlib import Path

from tiny_sweeps import METRIC, folder_of, tiny_sweep

from dtr_ray.search.results import write_trials
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training.reports import Report

ALL = ["kid", "inception_score", "precision_recall"]


def test_extra_metrics_have_columns_and_the_right_best(tmp_path: Path):
    config = tiny_sweep(tmp_path, trial__evaluation__extra_metrics=ALL, early_stopping={"name": "none"})
    (kernel,), (score,), (precision, recall) = config.trial.evaluation.extra_names.values()
    folder_of(config).mkdir()
    save_config(config, folder_of(config))
    state = SweepState(config, folder_of(config))
    trial = state.next_trial()
    assert not isinstance(trial, str)
    for step, sign in ((10, 1), (20, -1), (30, 0)):
        metrics = dict.fromkeys((METRIC, kernel, score, precision, recall), 5.0 + sign)
        state.report(trial.trial_id, Report(step, metrics, f"checkpoints/{step:08d}", "g.png"))
    state.finish(trial.trial_id, "completed")
    write_trials(state)
    with (folder_of(config) / "trials.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {row[f"{name}.last"] for name in (METRIC, kernel, score, precision, recall)} == {"5.0"}
    assert [row[f"{name}.best"] for name in (METRIC, kernel)] == ["4.0", "4.0"]
    assert [row[f"{name}.best"] for name in (score, precision, recall)] == ["6.0", "6.0", "6.0"]
