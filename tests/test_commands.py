"""The entry points that need no Ray: train, evaluate, sample."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_trials import METRIC, TINY

from dtr_ray import evaluate, sample, train
from dtr_ray.export.folder import export_model
from dtr_ray.training.reports import ReportFile


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial's YAML file."""
    path = tmp_path_factory.mktemp("commands") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(space: Path) -> Path:
    """The folder that `train` leaves behind."""
    folder = space.parent / "run"
    assert train.main([str(space), "--output", str(folder), "--set", "evaluation.every_steps=3"]) == 0
    return folder


def value_in(text: str) -> tuple[str, float]:
    """Name and value of the metric that `evaluate` prints."""
    match = re.match(r"(\S+) (\S+)(?: ± \S+)? \(", text)
    assert match is not None, text
    return match[1], float(match[2])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: a single line without a traceback."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_train_leaves_a_trials_folder(run: Path):
    reports = ReportFile(run / "reports.jsonl").read()
    assert [report.step for report in reports] == [3, 6]
    assert json.loads((run / "trial.json").read_text(encoding="utf-8"))["evaluation"]["every_steps"] == 3
    assert (run / reports[-1].checkpoint / "ema.safetensors").is_file()
    assert (run / reports[-1].grid).is_file()


def test_train_prints_losses_and_distances(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train.main([str(space), "--output", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].rsplit(" ", 1)[0] for line in lines[:4]] == [
        "step 2/6: train_loss", "step 4/6: train_loss", "step 6/6: train_loss", f"step 6/6: {METRIC}",
    ]  # fmt: skip


def test_train_refuses_a_used_folder_and_resumes_it(
    space: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(space), "--output", str(run), "--set", "evaluation.every_steps=3"]
    before = (run / "reports.jsonl").read_text(encoding="utf-8")
    assert train.main(words) == 2
    assert "--resume goes on" in error_of(capsys)
    assert train.main([*words, "--resume"]) == 0
    assert (run / "reports.jsonl").read_text(encoding="utf-8") == before


def test_train_goes_on_to_a_longer_schedule(space: Path, tmp_path: Path):
    words = [str(space), "--output", str(tmp_path / "run")]
    assert train.main(words) == 0
    assert train.main([*words, "--set", "training.num_steps=12", "--resume"]) == 0
    assert [report.step for report in ReportFile(tmp_path / "run" / "reports.jsonl").read()] == [6, 12]


def test_evaluate_repeats_the_trials_own_figure_from_every_kind_of_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    best = min(ReportFile(run / "reports.jsonl").read(), key=lambda report: report.metrics[METRIC])
    export_model(run, tmp_path / "model")
    for folder in (run, run / best.checkpoint, tmp_path / "model", tmp_path):
        assert evaluate.main([str(folder)]) == 0
        name, value = value_in(capsys.readouterr().out)
        assert name == METRIC
        assert value == pytest.approx(best.metrics[METRIC], rel=1e-4)


def test_evaluate_names_the_metric_for_what_it_measured(run: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate.main([str(run), "--num-samples", "24", "--set", "sampling.num_steps=3"]) == 0
    text = capsys.readouterr().out
    assert value_in(text)[0] == "fd_efficientnet_lite0_24"
    assert "(24 samples, ddim with 3 steps" in text


def test_sample_writes_a_grid_of_the_classes_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "new" / "grid.png"
    assert (
        sample.main([str(run), "--labels", "3,5", "--num", "6", "--seed", "4", "--output", str(output)]) == 0
    )
    assert capsys.readouterr().out.startswith(f"{output}: 6 samples of ")
    # Two columns, three rows of 8 x 8 pixels with a line between, enlarged 8 times.
    assert Image.open(output).size == (19 * 8, 28 * 8)


def test_sample_writes_arrays_of_the_evaluations_own_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    drawn, measured = tmp_path / "new" / "drawn.npz", tmp_path / "measured.npz"
    assert sample.main([str(run), "--output", str(drawn)]) == 0
    assert capsys.readouterr().out.startswith(f"{drawn}: 16 samples of ")
    assert evaluate.main([str(run), "--save-samples", str(measured)]) == 0
    with np.load(drawn, allow_pickle=False) as arrays, np.load(measured, allow_pickle=False) as expected:
        assert {name: arrays[name].shape for name in arrays} == {"arr_0": (16, 8, 8, 3), "arr_1": (16,)}
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert sample.main([str(run), "--num", "5", "--labels", "7,3", "--output", str(drawn)]) == 0
    with np.load(drawn, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3)
        assert arrays["arr_1"].tolist() == [7, 3, 7, 3, 7]
    assert list(drawn.parent.iterdir()) == [drawn]


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_workers_measure_and_draw_what_one_process_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = []
    for workers in ("1", "2"):
        path = tmp_path / f"{workers}.npz"
        words = ["--num-samples", "70", "--workers", workers, "--save-samples", str(path), "--timings"]
        assert evaluate.main([str(run), *words]) == 0
        line, times = capsys.readouterr().out.splitlines()
        assert re.match(r"time: sampling \S+ s \(.*, waiting \S+ s \(\d+%\)$", times)
        with np.load(path, allow_pickle=False) as arrays:
            found.append((line.split(" (")[0], arrays["arr_0"].tolist(), arrays["arr_1"].tolist()))
    assert found[0] == found[1]
    assert re.fullmatch(r"fd_efficientnet_lite0_70 \S+ ± \S+", found[0][0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_worker_refuses_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--labels", "10", "--num", "60", "--workers", "2", "--output", str(tmp_path / "a.png")]
    assert sample.main([str(run), *words]) == 2
    assert "class label 10 is not in [0, 10)" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_enough_samples_are_extrapolated_unless_one_says_otherwise(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(run), "--num-samples", "1290"]) == 0
    distance, infinity = capsys.readouterr().out.splitlines()
    name, value = infinity.split()
    assert name == "fd_efficientnet_lite0_infinity"
    assert 0 < float(value) < value_in(distance)[1]
    sets = ["--set", "evaluation.extrapolate=true"]
    assert evaluate.main([str(run), "--num-samples", "1280", *sets]) == 2
    assert "evaluation.extrapolate=true: takes more samples than the 1280 features" in error_of(capsys)


def test_sample_draws_the_same_again_and_other_images_with_another_seed(run: Path, tmp_path: Path):
    pictures = []
    for seed in ("0", "0", "1"):
        assert sample.main([str(run), "--seed", seed, "--output", str(tmp_path / "grid.png")]) == 0
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_sample_without_options_draws_the_trials_own_grid(run: Path, tmp_path: Path):
    assert sample.main([str(run), "--num", "16", "--output", str(tmp_path / "grid.png")]) == 0
    best = min(ReportFile(run / "reports.jsonl").read(), key=lambda report: report.metrics[METRIC])
    assert Image.open(tmp_path / "grid.png").tobytes() == Image.open(run / best.grid).tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "1,x", "--output", "a.png"], "'1,x' is not a list of whole numbers"),
        (["--num", "many", "--output", "a.png"], "invalid int value: 'many'"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_arguments_that_cannot_be_read_exit_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["run", *words])
    assert stopped.value.code == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "1,10"], "class label 10 is not in [0, 10)"),
        (["--num", "0"], "--num is 0: it must be at least 1"),
        (["--seed", "-1"], "--seed is -1: it must be at least 0"),
        (["--guidance", "0.2"], "guidance_scale is 0.2: it must be at least 1"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--steps", "1001"], "num_steps is 1001: it must be from 1 to 1000"),
        (["--output", "grid.jpg"], "its name must end in .png or .npz"),
        (["--workers", "0"], "--workers is 0: it must be at least 1"),
        (["--tracking-uri", "sqlite:///x.db"], "--tracking-uri is for runs:/ID and models:/NAME/VERSION"),
    ],
)
def test_sample_refuses_values_out_of_range(
    run: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert sample.main([str(run), "--output", str(tmp_path / "grid.png"), *words]) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("command", [evaluate.main, sample.main])
def test_what_is_no_model_is_named(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--output", str(tmp_path / "grid.png")] if command is sample.main else []
    assert command([str(tmp_path / "nowhere"), *words]) == 2
    assert f"{tmp_path / 'nowhere'} is not a folder" in error_of(capsys)
    assert command([str(tmp_path), *words]) == 2
    assert f"{tmp_path} holds no trained model" in error_of(capsys)


def test_weights_that_do_not_fit_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = json.loads((run / "trial.json").read_text(encoding="utf-8"))
    config["model"]["hidden_size"] = 16
    (checkpoint / "trial.json").write_text(json.dumps(config), encoding="utf-8")
    weights = next((run / "checkpoints").iterdir()) / "ema.safetensors"
    (checkpoint / "ema.safetensors").write_bytes(weights.read_bytes())
    assert evaluate.main([str(checkpoint)]) == 2
    assert "has shape" in error_of(capsys)


def test_evaluate_refuses_wrong_settings(run: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate.main([str(run), "--num-samples", "1"]) == 2
    assert "must be at least 2, got 1" in error_of(capsys)
    assert evaluate.main([str(run), "--features", "resnet"]) == 2
    assert "'resnet' is not one of inception, efficientnet_lite0" in error_of(capsys)
    assert evaluate.main([str(run), "--set", "sampling.stepz=3"]) == 2
    assert "did you mean sampling" in error_of(capsys)


def test_train_says_what_is_wrong_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "trial.yaml"
    path.write_text("routing: {name: dtr, beta: 0}\n", encoding="utf-8")
    assert train.main([str(path), "--output", str(tmp_path / "run")]) == 2
    assert f"{path}:1: routing.beta: must be above 0" in error_of(capsys)
    assert not (tmp_path / "run").exists()


ALL_METRICS = "kid,inception_score,precision_recall"
ALL_NAMES = [f"{kind}_efficientnet_lite0_16" for kind in ("fd", "kd", "is", "precision", "recall")]
REPORTED = [METRIC, f"{METRIC}_stderr", *ALL_NAMES[1:]]


def test_extra_metrics_of_a_trial_are_in_its_reports_and_in_its_evaluation(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    words = ["--set", f"evaluation.extra_metrics=[{ALL_METRICS}]", "--set", "training.num_steps=6"]
    assert train.main([str(space), "--output", str(folder), *words]) == 0
    capsys.readouterr()
    report = ReportFile(folder / "reports.jsonl").read()[-1]
    assert list(report.metrics) == [*REPORTED, "eval_seconds", "train_seconds"]
    assert evaluate.main([str(folder)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    found = dict([value_in(first), *[(line.split()[0], float(line.split()[1])) for line in others]])
    assert found == {name: pytest.approx(report.metrics[name], rel=1e-4) for name in ALL_NAMES}


def test_a_sweep_over_guidance_prints_a_table_and_writes_figures_and_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, samples = tmp_path / "new" / "results.csv", tmp_path / "samples.npz"
    words = ["--guidance", "1,1.5,300", "--metrics", ALL_METRICS, "--output", str(output)]
    assert evaluate.main([str(run), *words, "--save-samples", str(samples)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 samples, ddim with 2 steps; ")
    cells = {words[0]: words[1:] for words in map(str.split, lines) if len(words) == 4}
    assert cells["guidance"] == ["1", "1.5", "300"]
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = ["guidance_scale", "num_samples", "sampler", "num_steps"]
    assert list(rows[0]) == [*settings, *REPORTED, "eval_seconds"]
    assert [row["guidance_scale"] for row in rows] == ["1.0", "1.5", "300.0"]
    for name in ALL_NAMES:
        assert cells[name] == [f"{float(row[name]):.5g}" for row in rows]
    # After 6 steps the classes differ so little that it takes that much to see it.
    assert rows[0][METRIC] != rows[2][METRIC]
    # The first scale is the trial's own: the same noise, the same samples, the same distance.
    best = min(ReportFile(run / "reports.jsonl").read(), key=lambda report: report.metrics[METRIC])
    assert float(rows[0][METRIC]) == pytest.approx(best.metrics[METRIC], rel=1e-4)
    files = [tmp_path / f"samples-guidance{scale}.npz" for scale in ("1", "1.5", "300")]
    assert set(tmp_path.glob("*.npz")) == set(files)
    pictures = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            pictures.append(arrays["arr_0"])
            assert arrays["arr_1"].tolist() == [i % 10 for i in range(16)]
    assert [(p.shape, p.dtype) for p in pictures] == [((16, 8, 8, 3), np.uint8)] * 3
    assert not np.array_equal(pictures[0], pictures[2])


def test_metrics_without_guidance_are_measured_at_the_trials_own_scale(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    samples = tmp_path / "samples.npz"
    assert evaluate.main([str(run), "--metrics", "kid", "--save-samples", str(samples)]) == 0
    text = capsys.readouterr().out
    assert [word for word in text.split() if word.endswith("_16")] == ALL_NAMES[:2]
    assert samples.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "kid,inception"], "--metrics inception: no metric beside the distance; did you mean"),
        (["--metrics", "precision_recal"], "did you mean precision_recall?"),
        (["--metrics", ""], "no metric beside the distance; known: kid, inception_score, precision_recall"),
        (["--guidance", "1,0.5"], "--guidance 0.5: a scale must be at least 1"),
        (["--guidance", "nan"], "--guidance nan: a scale must be at least 1"),
        (["--guidance", "1,inf"], "--guidance inf: a scale must be at least 1"),
        (["--output", "results.txt"], "--output is results.txt: its name must end in .csv"),
        (["--save-samples", "samples.npy"], "--save-samples is samples.npy: its name must end in .npz"),
        (["--metrics", "inception_score", "--num-samples", "9"], "9 is too few for inception_score"),
        (["--num-samples", "1"], "--num-samples 1: must be at least 2, got 1"),
        (
            ["--guidance", "1,2", "--set", "model.class_dropout_prob=0"],
            "--guidance 2: 2 is guidance, which needs model.class_dropout_prob",
        ),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(run), *words]) == 2
    assert message in error_of(capsys)


def test_an_unconditional_model_is_not_guided(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    assert train.main([str(space), "--output", str(folder), "--set", "data.num_classes=1"]) == 0
    capsys.readouterr()
    output = tmp_path / "results.csv"
    assert evaluate.main([str(folder), "--guidance", "1,2", "--output", str(output)]) == 2
    message = error_of(capsys)
    assert "2 is guidance, which needs classes; the data is unconditional" in message
    assert "--set" not in message
    # Not even the scale that could have been measured.
    assert not output.exists()


def test_guidance_that_is_no_list_of_numbers_exits_with_2(run: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(run), "--guidance", "1,x"])
    assert stopped.value.code == 2
    assert "'1,x' is not a list of numbers such as 1,1.5,2" in error_of(capsys)
