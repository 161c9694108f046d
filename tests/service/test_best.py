import json
import os
import shutil
from pathlib import Path

import pytest
from finished_sweep import PARAMS, SWEEP, log_sweep, make_sweep
from tiny_trials import METRIC

from dtr_ray.config import SweepConfig
from dtr_ray.service.best import best_in_experiment, best_in_folder, lineage, newest_sweep
from dtr_ray.service.final_run import final_config
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.run_log import sweep_identity
from dtr_ray.service.tracking import Tracker


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sweep(root: Path) -> Path:
    return make_sweep(root)


@pytest.fixture(scope="module")
def runs(sweep: Path) -> tuple[str, str]:
    """MLflow's ids of the sweep's run and the trial's."""
    return log_sweep(sweep)


def test_folder_tells_the_best_trial(sweep: Path, root: Path):
    best = best_in_folder(sweep)
    assert best.config == SweepConfig.from_dict(SWEEP).trial_config(PARAMS)
    assert (best.trial_id, best.metric, best.step) == ("t0000", METRIC, 6)
    assert best.checkpoint == sweep / "trials" / "t0000" / "checkpoints" / "00000006"
    assert best.tracking_uri == f"sqlite:///{root / 'mlflow.db'}"


def test_experiment_tells_the_same_trial_as_the_folder(sweep: Path, root: Path, runs: tuple[str, str]):
    ours, theirs = best_in_experiment("tiny", root), best_in_folder(sweep)
    assert (ours.trial_id, ours.config, ours.value, ours.step) == (
        theirs.trial_id, theirs.config, theirs.value, theirs.step,
    )  # fmt: skip
    assert (ours.sweep, ours.folder, ours.tracking_uri) == (theirs.sweep, theirs.folder, theirs.tracking_uri)
    assert ours.checkpoint == theirs.checkpoint
    assert ours.run_id == runs[1]


def test_lineage_is_found_with_and_without_the_runs_id(sweep: Path, root: Path, runs: tuple[str, str]):
    assert lineage(best_in_experiment("tiny", root)) == runs
    assert best_in_folder(sweep).run_id is None
    assert lineage(best_in_folder(sweep)) == runs


def test_lineage_of_a_sweep_that_mlflow_has_not_heard_of_is_unknown(tmp_path: Path):
    assert lineage(best_in_folder(make_sweep(tmp_path))) is None


def test_experiment_takes_the_smallest_value_ever_reached_by_a_trial_that_did_not_fail(tmp_path: Path):
    folder = make_sweep(tmp_path)
    log_sweep(folder)
    values = {"worse": [(6, 9e9)], "rose": [(0, 1.0), (3, 2.0), (6, 8e9)], "broken": [(3, 0.5)]}
    for trial, history in values.items():
        (folder / "trials" / trial).mkdir()
        shutil.copy(folder / "trials" / "t0000" / "trial.json", folder / "trials" / trial)
        with RecordWriter(record_path(folder, trial, "driver")) as writer:
            writer.start(trial, {"dtr_ray.kind": "trial", "dtr_ray.trial_id": trial}, {}, "sweep")
            writer.artifact(f"trials/{trial}/trial.json")
            for step, value in history:
                writer.metrics(step, {METRIC: value})
            writer.tags({"dtr_ray.status": "failed" if trial == "broken" else "completed"})
            writer.end("FINISHED")
    tracker = Tracker(folder, f"sqlite:///{tmp_path / 'mlflow.db'}", "tiny", sweep_identity(folder))
    tracker.start()
    assert tracker.close(60.0) == 0
    best = best_in_experiment("tiny", tmp_path)
    assert (best.trial_id, best.value, best.step) == ("rose", 2.0, 3)


def test_full_schedule_is_the_best_trial_with_the_sweeps_changes(sweep: Path):
    best = best_in_folder(sweep)
    config = final_config(best)
    assert config.routing == best.config.routing
    assert (config.training.num_steps, config.evaluation.num_samples) == (12, 24)
    assert config.training.batch_size == best.config.training.batch_size


def test_newest_sweep_is_the_one_whose_best_trial_was_written_last(sweep: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no finished sweep in"):
        newest_sweep(tmp_path)
    for number, name in enumerate(("first", "second", "unfinished")):
        shutil.copytree(sweep, tmp_path / name)
        path = tmp_path / name / "best.json"
        if name == "unfinished":
            path.unlink()
        else:
            os.utime(path, (number, number))
    assert newest_sweep(tmp_path) == tmp_path / "second"


def test_what_is_no_finished_sweep_is_named(sweep: Path, root: Path, tmp_path: Path, runs: tuple[str, str]):
    with pytest.raises(ValueError, match=r"not the folder of a sweep: it has no best.json"):
        best_in_folder(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ValueError, match="has no best trial yet"):
        best_in_folder(tmp_path)
    (tmp_path / "best.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no sweep.json"):
        best_in_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no MLflow store"):
        best_in_experiment("tiny", tmp_path)
    with pytest.raises(ValueError, match="has no experiment 'other'; there are: tiny"):
        best_in_experiment("other", root)


def test_a_checkpoint_that_is_gone_is_none(sweep: Path, tmp_path: Path):
    shutil.copytree(sweep, tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "trials")
    assert best_in_folder(tmp_path / "sweep").checkpoint is None
