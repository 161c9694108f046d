"""The command `analyze`: what it prints and leaves, and that training takes what it has measured."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from finished_sweep import make_sweep
from PIL import Image
from tiny_sweeps import SWEEP, tiny_sweep
from tiny_trials import METRIC, TINY, digits

from dtr_ray import analyze, sweep, train
from dtr_ray.config import override
from dtr_ray.diffusion.affinity import load_affinity
from dtr_ray.diffusion.intervals import measured_intervals
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training import train as train_model

FEW = ["--timesteps", "12", "--batches", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder, whose best trial is a model of 1000 timesteps."""
    return make_sweep(tmp_path_factory.mktemp("analyze"))


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """The file that `affinity` leaves behind, measured in this process."""
    assert analyze.main(["affinity", str(folder), *FEW, "--workers", "0"]) == 0
    return folder / "affinity.npz"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: a single line without a traceback."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def yaml_with(path: Path, weighting: dict[str, Any], **changes: Any) -> Path:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(yaml.safe_dump(override(TINY, dotted) | {"weighting": weighting}), encoding="utf-8")
    return path


def by_affinity(path: Path, **rest: Any) -> dict[str, Any]:
    return {"name": "ant_uw", "num_clusters": 5, "intervals": {"name": "affinity", "from": str(path)}, **rest}


def test_affinity_prints_the_file_the_intervals_and_the_line_for_a_yaml(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "new folder" / "found.npz"
    assert analyze.main(["affinity", str(folder), *FEW, "--workers", "0", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    found = load_affinity(output)
    assert (len(found.timesteps), found.num_timesteps) == (12, 1000)
    for clusters in (5, 8):
        cut = ", ".join(f"[{a}, {b})" for a, b in measured_intervals(found, clusters))
        assert f"K={clusters}       {cut}\n" in text
    assert f"{output} (12 of 1000 timesteps" in text
    line = yaml.safe_load(text.splitlines()[-1])
    assert line == {"intervals": {"name": "affinity", "from": str(output)}}
    assert "100% of 12 timesteps, 2 batches" in text
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.width > 500


def test_a_second_call_returns_at_once_and_says_so(
    folder: Path, measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = measured.stat().st_mtime_ns
    capsys.readouterr()

    def never(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("dtr_ray.analysis.affinity.measure_affinity", never)
    # Who measures it makes no difference: without --workers 0 Ray would have been started.
    assert analyze.main(["affinity", str(folder), *FEW]) == 0
    text = capsys.readouterr().out
    assert f"measured before, with the same model and settings: {measured}" in text
    assert "K=8 " in text
    assert measured.stat().st_mtime_ns == before


def test_other_settings_are_measured_anew(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["affinity", str(folder), "--workers", "0", "--output", str(tmp_path / "a.npz"), "--batches", "1"]
    for count in ("6", "7"):
        assert analyze.main([*words, "--timesteps", count, "--batch-size", "2"]) == 0
        assert "measured before" not in capsys.readouterr().out
        assert len(load_affinity(tmp_path / "a.npz").timesteps) == int(count)


def test_rays_workers_measure_the_same(ray_cluster: str, folder: Path, measured: Path, tmp_path: Path):
    output = tmp_path / "ray.npz"
    words = ["affinity", str(folder), *FEW, "--workers", "2", "--output", str(output)]
    assert analyze.main(words) == 0
    one, many = load_affinity(measured), load_affinity(output)
    np.testing.assert_allclose(one.matrix, many.matrix, atol=1e-5)
    assert one.source == many.source


def test_a_model_trains_with_the_intervals_that_were_measured(measured: Path, tmp_path: Path):
    trial = yaml_with(tmp_path / "trial.yaml", by_affinity(measured))
    assert train.main([str(trial), "--output", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "-1"], "--workers is -1: it must be at least 0"),
        (["--timesteps", "some"], "--timesteps is 'some': it must be a whole number, or `all`"),
        (["--timesteps", "1"], "1 timesteps are to be measured: it must be from 2 to all 1000"),
        (["--timesteps", "1001"], "it must be from 2 to all 1000"),
        (["--batches", "0"], "num_batches is 0: it must be at least 1"),
        (["--output", "a.png"], "the name of an affinity file ends in .npz"),
    ],
)
def test_affinity_refuses_values_out_of_range(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert analyze.main(["affinity", str(folder), "--workers", "0", *words]) == 2
    assert message in error_of(capsys)


def test_affinity_names_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert analyze.main(["affinity", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} is not a folder" in error_of(capsys)


@pytest.mark.parametrize("words", [[], ["afinity"], ["compare"], ["compare", "x", "--at", "first"]])
def test_arguments_that_cannot_be_read_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(words)
    assert stopped.value.code == 2
    assert "--help" in error_of(capsys)


def test_a_file_that_is_missing_is_told_with_its_place_in_the_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trial = yaml_with(tmp_path / "trial.yaml", by_affinity(Path("no.npz")))
    assert train.main([str(trial), "--output", str(tmp_path / "run")]) == 2
    text = error_of(capsys)
    assert f"{trial}:" in text
    assert "weighting.intervals.from: 'no.npz' does not exist" in text
    assert not (tmp_path / "run").exists()


def test_a_file_of_other_timesteps_is_refused_before_any_work(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trial = yaml_with(tmp_path / "trial.yaml", by_affinity(measured), diffusion__num_timesteps=500)
    assert train.main([str(trial), "--output", str(tmp_path / "run")]) == 2
    wanted = (
        f"weighting.intervals.from: '{measured}' is of 1000 timesteps, but diffusion.num_timesteps is 500"
    )
    assert wanted in error_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_sweep_looks_at_the_file_before_any_work(
    options: list[str], measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    space = tmp_path / "space.yaml"
    changes = {"trial.weighting": by_affinity(measured), "trial.diffusion.num_timesteps": 500}
    values = override(SWEEP, changes) | {"space": {"routing.alpha": {"type": "choice", "values": [1, 2]}}}
    space.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert sweep.main([str(space), "--output", str(tmp_path / "runs"), *options]) == 2
    assert "trial.weighting.intervals.from:" in error_of(capsys)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    set_from = f"trial.weighting.intervals.from={tmp_path / 'text.npz'}"
    assert sweep.main([str(space), "--output", str(tmp_path / "runs"), *options, "--set", set_from]) == 2
    assert "is no affinity file" in error_of(capsys)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real sweep of two methods with two seeds, run in this process."""
    point = {"training.seed": [0, 1], "routing.name": ["none", "dtr"]}
    short = {
        "trial__training__num_steps": 4,
        "trial__evaluation__every_steps": 2,
        "trial__sampling__num_steps": 2,
    }
    config = tiny_sweep(
        tmp_path_factory.mktemp("compared"),
        space={key: {"type": "choice", "values": values} for key, values in point.items()},
        search={"sampler": "points", "starting_points": [point]},
        early_stopping={"name": "none"},
        trial__evaluation__num_samples=16,
        **short,
    )
    folder = Path(config.storage.output) / config.name
    folder.mkdir(parents=True)
    save_config(config, folder)
    state = SweepState(config, folder)
    while not isinstance(record := state.next_trial(), str):
        trial = config.trial_config(record.params)
        for report in train_model(trial, state.trial_folder(record.trial_id), digits(trial)):
            state.report(record.trial_id, report, 1.0)
        state.finish(record.trial_id, "completed")
    state.close()
    return folder


def test_compare_prints_and_writes_a_row_a_method(compared: Path, capsys: pytest.CaptureFixture[str]):
    assert analyze.main(["compare", str(compared), "--baseline", "routing.name=none"]) == 0
    text = capsys.readouterr().out
    assert METRIC in text
    assert text.count("2 completed") == 2
    assert "baseline" in text
    assert f"{compared / 'compare.csv'}\n" in text
    with (compared / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["routing.name"]: row for row in csv.DictReader(file)}
    assert [rows[name]["n"] for name in ("none", "dtr")] == ["2", "2"]
    gap = float(rows["dtr"]["mean"]) - float(rows["none"]["mean"])
    assert float(rows["dtr"]["difference"]) == pytest.approx(gap)
    assert rows["dtr"]["difference_pairs"] == "2"
    assert (compared / "compare.md").read_text(encoding="utf-8").count("\n| ") == 4


def test_compare_tells_what_was_measured_and_refuses_to_mix(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other"
    shutil.copytree(compared, other)
    for name in ("journal.jsonl", "sweep.json"):
        text = (other / name).read_text(encoding="utf-8")
        text = text.replace('"sampling.num_steps": 2', '"sampling.num_steps": 1')
        (other / name).write_text(text, encoding="utf-8")
    assert analyze.main(["compare", str(compared), str(other)]) == 2
    assert "sampling.num_steps is 1, not 2): --mixed makes a table of each" in capsys.readouterr().err
    assert analyze.main(["compare", str(compared), str(other), "--mixed"]) == 0
    assert capsys.readouterr().out.count("Measured:") == 2


def test_proxy_measures_prints_and_writes_a_row_a_checkpoint(
    compared: Path, capsys: pytest.CaptureFixture[str]
):
    assert analyze.main(["proxy", str(compared), "--set", "evaluation.proxy.num_samples=8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "proxy_fd_efficientnet_lite0_8 against" in text
    assert "step 4, 4 checkpoints: Spearman" in text
    assert "the proxy's better half holds" in text
    assert text.endswith(str(compared / "proxy.csv"))
    with (compared / "proxy.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "4"]
    assert [row["trial"] for row in rows] == ["t0000", "t0001", "t0002", "t0003"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no evaluation.proxy: give one, such as --set evaluation.proxy.num_samples=1000"),
        (
            ["--set", "evaluation.proxy.num_samples=99"],
            "--set evaluation.proxy.num_samples=99: 99 is more than",
        ),
    ],
)
def test_proxy_refuses_what_cannot_be_measured(
    compared: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert analyze.main(["proxy", str(compared), *words]) == 2
    assert message in error_of(capsys)


def test_compare_takes_another_metric_and_the_last_value(compared: Path, capsys: pytest.CaptureFixture[str]):
    assert analyze.main(["compare", str(compared), "--metric", "train_seconds", "--at", "last"]) == 0
    assert "train_seconds (last value)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--baseline", "routing.name"], "--baseline routing.name: it must be KEY=VALUE"),
        (["--baseline", "routing.name=[none"], "--baseline routing.name=[none:"),
        (["--baseline", "routing.nme=none"], "did you mean routing.name?"),
        (["--baseline", "routing.name=random"], "no trial has it; there are routing.name: dtr, none"),
        (["--metric", "fid"], "no trial has reported a metric 'fid'"),
    ],
)
def test_compare_refuses_what_is_not_there(
    compared: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert analyze.main(["compare", str(compared), *words]) == 2
    assert message in error_of(capsys)
