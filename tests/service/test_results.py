"""What a sweep leaves behind: files for people and programs, and runs in MLflow."""

import csv
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from kills import by_step, check_accounts, check_mlflow, runs_of
from mlflow import MlflowClient
from PIL import Image
from service.mlflow_server import MlflowServer, free_port
from tiny_sweeps import METRIC, TIMES, Finished, attempts, folder_of, read_json, records, tiny_sweep
from tiny_trials import size_of

from dtr_ray.config import SweepConfig, TrialConfig, flatten
from dtr_ray.config.protocol import describe
from dtr_ray.models.routing import dtr_mask
from dtr_ray.service.pictures import draw_mask
from dtr_ray.service.storage import storage_of
from dtr_ray.service.sweep import run_sweep
from dtr_ray.training.retention import LASTING
from dtr_ray.training.state import find_damage


@pytest.fixture
def client(finished_sweep: Finished) -> MlflowClient:
    return MlflowClient(tracking_uri=finished_sweep.outcome.tracking_uri)


def test_the_folder_holds_no_more_than_the_plan_has_told(finished_sweep: Finished):
    folder, told = finished_sweep.folder, storage_of(finished_sweep.config, 2)
    for trial in (folder / "trials").iterdir():
        checkpoints = list((trial / "checkpoints").iterdir())
        assert 1 <= len(checkpoints) <= LASTING
        assert max(map(size_of, checkpoints)) <= told.checkpoint
    assert size_of(folder) <= told.total


def test_best_json_has_the_documented_keys_and_leads_to_a_whole_checkpoint(finished_sweep: Finished):
    best = read_json(finished_sweep.folder / "best.json")
    assert list(best) == [
        "trial_id",
        "metric",
        "mode",
        "value",
        "standard_error",
        "step",
        "protocol",
        "config",
        "checkpoint",
        "mlflow_run_id",
    ]
    record, step, value = finished_sweep.outcome.state.ranked()[0]
    assert (best["trial_id"], best["metric"], best["mode"]) == (record.trial_id, METRIC, "min")
    assert (best["value"], best["step"]) == (value, step)
    assert best["standard_error"] == record.reports[step][f"{METRIC}_stderr"]
    assert best["protocol"] == record.protocols[step] == finished_sweep.outcome.state.protocol
    assert TrialConfig.from_dict(best["config"]) == finished_sweep.config.trial_config(record.params)
    checkpoint = finished_sweep.folder / best["checkpoint"]
    assert find_damage(checkpoint) is None
    assert int(checkpoint.name) == step


def test_trials_csv_has_a_row_a_trial_and_the_documented_columns(finished_sweep: Finished):
    with (finished_sweep.folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("eval_seconds", METRIC, f"{METRIC}_stderr", "train_seconds")
    reported = [f"{name}.{which}" for name in names for which in ("last", "best")]
    params = ["routing.alpha", "routing.beta", "weighting.name", "weighting.gamma"]
    assert list(rows[0]) == [
        "id",
        "status",
        "steps",
        *params,
        *reported,
        "wall_seconds",
        "device_seconds",
        "retries",
        "protocol",
        "reason",
    ]
    trials = records(finished_sweep.folder)
    assert [row["id"] for row in rows] == list(trials)
    for row in rows:
        trial = trials[row["id"]]
        assert row["status"] == trial.status
        assert int(row["steps"]) == trial.last_step
        assert {name: row[name] for name in params} == {n: str(trial.params.get(n, "")) for n in params}
        values = [metrics[METRIC] for step, metrics in trial.reports.items() if step]
        assert float(row[f"{METRIC}.last"]) == trial.reports[trial.last_step][METRIC]
        assert float(row[f"{METRIC}.best"]) == min(values)
        best_step = next(s for s, metrics in trial.reports.items() if s and metrics[METRIC] == min(values))
        error = trial.reports[best_step][f"{METRIC}_stderr"]
        assert float(row[f"{METRIC}_stderr.best"]) == error > 0
        assert row["protocol"] == describe(trial.protocols[trial.last_step])
        assert "digits-8-" in row["protocol"]
        assert float(row["wall_seconds"]) >= float(row["train_seconds.last"]) > 0
        assert row["device_seconds"] == row["wall_seconds"]
        assert bool(row["reason"]) == (row["status"] == "pruned")


def test_the_montage_shows_best_above_worst(finished_sweep: Finished):
    montage = finished_sweep.outcome.montage
    assert montage is not None
    picture = Image.open(montage).convert("RGB")
    (best, step, _), *_, (worst, worst_step, _) = finished_sweep.outcome.state.ranked()
    tiles = [
        np.asarray(
            Image.open(finished_sweep.folder / "trials" / r.trial_id / "grids" / f"{s:08d}.png").convert(
                "RGB"
            )
        )
        for r, s in ((best, step), (worst, worst_step))
    ]
    height, width, _ = tiles[0].shape
    caption = picture.height // 2 - height
    shown = np.asarray(picture)
    assert np.array_equal(shown[caption : caption + height, :width], tiles[0])
    assert np.array_equal(shown[2 * caption + height :, :width], tiles[1])


def test_every_trial_has_one_run_with_each_step_of_each_metric_once(finished_sweep: Finished):
    assert finished_sweep.outcome.records_waiting == 0
    check_accounts(finished_sweep.config)
    check_mlflow(finished_sweep.config)


def test_runs_tell_what_was_run_where(finished_sweep: Finished, client: MlflowClient):
    parent, children = runs_of(client, "tiny")
    tags = parent.data.tags
    assert tags["mlflow.runName"] == "tiny"
    assert tags["dtr_ray.metric"] == METRIC
    assert tags["dtr_ray.protocol"] == describe(finished_sweep.outcome.state.protocol)
    assert "digits-8-" in tags["dtr_ray.protocol"]
    best = read_json(finished_sweep.folder / "best.json")
    assert tags["dtr_ray.best_trial"] == best["trial_id"]
    assert children[best["trial_id"]].info.run_id == best["mlflow_run_id"]
    assert parent.data.params["search.num_trials"] == "6"
    for trial_id, run in children.items():
        for name in (
            "env.python",
            "env.torch",
            "env.ray",
            "env.host",
            "env.device",
            "mlflow.source.git.commit",
        ):
            if name != "mlflow.source.git.commit" or name in tags:
                assert run.data.tags[name], name
        assert run.data.tags["mlflow.runName"] == trial_id
        config = finished_sweep.config.trial_config(finished_sweep.outcome.state.trials[trial_id].params)
        assert run.data.params == {name: str(value) for name, value in flatten(config.to_dict()).items()}
        checkpoint = Path(run.data.tags["dtr_ray.checkpoint"])
        assert find_damage(checkpoint) is None
        assert run.info.end_time > run.info.start_time
        weights = {f"balancer/weight_{g}" for g in range(getattr(config.weighting, "num_clusters", 0))}
        measured = {"train_loss", "train_images_per_s", METRIC, f"{METRIC}_stderr"} | TIMES
        assert set(run.data.metrics) == measured | weights


def test_runs_keep_configuration_grids_mask_and_results(finished_sweep: Finished, client: MlflowClient):
    parent, children = runs_of(client, "tiny")
    assert names(client, parent.info.run_id) == ["best.json", "montage.png", "sweep.json", "trials.csv"]
    kept = client.download_artifacts(parent.info.run_id, "sweep.json")
    assert SweepConfig.model_validate_json(Path(kept).read_text()) == finished_sweep.config
    for trial_id, run in children.items():
        trial = finished_sweep.outcome.state.trials[trial_id]
        assert names(client, run.info.run_id) == ["mask.png", "samples", "trial.json"]
        grids = names(client, run.info.run_id, "samples")
        assert grids == [f"samples/{step:08d}.png" for step in sorted(trial.reports)]


def names(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def test_grids_of_all_trials_start_from_the_same_noise(finished_sweep: Finished):
    """The untrained model draws noise: at the first evaluation trials of one seed still look alike."""
    tags = {
        (r.params["routing.alpha"], r.params["weighting.name"])
        for r in finished_sweep.outcome.state.trials.values()
    }
    assert len(tags) > 1
    grids = [
        np.asarray(
            Image.open(finished_sweep.folder / "trials" / trial_id / "grids" / "00000010.png"), np.float32
        )
        for trial_id in finished_sweep.outcome.state.trials
    ]
    for grid in grids[1:]:
        assert np.corrcoef(grids[0].ravel(), grid.ravel())[0, 1] > 0.5


def test_the_mask_is_drawn_once_a_trial(finished_sweep: Finished):
    trial = finished_sweep.outcome.state.trials["t0000"]
    mask = dtr_mask(1000, 32, trial.params["routing.alpha"], trial.params["routing.beta"])
    expected = np.asarray(draw_mask(mask.numpy()))
    shown = np.asarray(Image.open(finished_sweep.folder / "trials" / "t0000" / "mask.png"))
    assert np.array_equal(shown, expected)


@pytest.mark.parametrize("shape", [(1000, 32), (1000, 1152), (2, 3), (4000, 5000)])
def test_a_mask_of_any_size_is_a_picture_of_bounded_size(shape: tuple[int, int]):
    mask = np.zeros(shape, dtype=bool)
    mask[: shape[0] // 2, : shape[1] // 2] = True
    picture = np.asarray(draw_mask(mask))
    assert 320 <= picture.shape[0] < 1700
    assert 320 <= picture.shape[1] < 1700
    blue = (picture == (31, 95, 173)).all(axis=2)
    rows, columns = np.nonzero(blue)
    assert rows.max() < picture.shape[0] * 0.6
    assert columns.max() < picture.shape[1] * 0.6


def test_attempts_tell_who_trained_what(finished_sweep: Finished):
    pids = set()
    for trial_id, trial in finished_sweep.outcome.state.trials.items():
        (attempt,) = attempts(finished_sweep.folder, trial_id)
        assert (attempt.attempt, attempt.from_step, attempt.to_step) == (1, 0, trial.last_step)
        assert attempt.first_step_s is not None
        assert 0 < attempt.first_step_s <= attempt.last_s
        assert attempt.started < time.time()
        pids.add(attempt.pid)
    assert len(pids) == 2, "a slot's process is used again by its next trial"


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_without_mlflow_the_sweep_runs_on_and_a_later_resume_sends_everything_once(
    ray_cluster: str, tmp_path: Path
):
    changes = {"search__num_trials": 2, "tracking__uri": f"http://127.0.0.1:{free_port()}"}
    config = tiny_sweep(tmp_path, **changes)
    outcome = run_sweep(config, folder_of(config))
    ended = time.monotonic()
    assert outcome.error is None
    assert outcome.records_waiting > 20
    assert outcome.best is not None
    assert outcome.best["mlflow_run_id"] is None
    server = MlflowServer(tmp_path)
    try:
        server.start()
        server.wait()
        reachable = tiny_sweep(tmp_path, **changes | {"tracking__uri": server.uri})
        before = records(folder_of(config))
        resumed = run_sweep(reachable, folder_of(config), resume=True)
        assert resumed.records_waiting == 0
        assert resumed.fit_seconds == 0
        assert records(folder_of(config)) == before
        check_mlflow(reachable, server.uri)
        _, children = runs_of(MlflowClient(tracking_uri=server.uri), "tiny")
        best = read_json(folder_of(config) / "best.json")
        assert best["mlflow_run_id"] == children[best["trial_id"]].info.run_id
    finally:
        server.kill()
    assert time.monotonic() - ended < 200


def test_loss_is_logged_against_the_training_step(finished_sweep: Finished, client: MlflowClient):
    _, children = runs_of(client, "tiny")
    history = by_step(client.get_metric_history(children["t0000"].info.run_id, "train_loss"))
    assert history[0].step == finished_sweep.config.trial.training.log_every_steps
    assert all(a.timestamp <= b.timestamp for a, b in itertools.pairwise(history))
