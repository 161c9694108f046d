"""trials.csv: the best value of a metric is the one that is better, whichever way that is."""

import csv
import json
from pathlib import Path

from tiny_sweeps import METRIC, folder_of, tiny_sweep

from dtr_ray.search import results
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


def test_a_long_table_is_not_written_at_every_end_but_whole_at_last(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(results, "_SHORT_TABLE", 3)
    monkeypatch.setattr(results, "_WRITE_SHARE", 1e-9)
    config = tiny_sweep(tmp_path, early_stopping={"name": "none"}, search__num_trials=6)
    folder_of(config).mkdir()
    state = SweepState(config, folder_of(config))
    state.listeners.append(results.ResultFiles(state))
    ended = []
    for number in range(6):
        trial = state.next_trial()
        assert not isinstance(trial, str)
        metrics = {METRIC: 9.0 - number}
        state.report(trial.trial_id, Report(10, metrics, "checkpoints/00000010", "g.png"))
        state.finish(trial.trial_id, "completed")
        with (folder_of(config) / "trials.csv").open(newline="", encoding="utf-8") as file:
            ended.append(len(list(csv.DictReader(file))))
        assert json.loads((folder_of(config) / "best.json").read_text())["value"] == metrics[METRIC]
    assert ended == [1, 2, 2, 2, 2, 2]
    write_trials(state)
    with (folder_of(config) / "trials.csv").open(newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["completed"] * 6
