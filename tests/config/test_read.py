"""Reading good files, several problems at once, and paths."""

import subprocess
import sys
from pathlib import Path

import pytest
from bad_yaml import GOOD

from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.errors import ConfigError
from dtr_ray.config.ignored import config_warnings
from dtr_ray.config.read import read_sweep, read_trial

SHIPPED = Path(__file__).parents[2] / "search_spaces"


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["quickstart", "ffhq", "imagenet"])
def test_shipped_files_are_right_and_ignore_nothing(name: str) -> None:
    sweep = read_sweep(SHIPPED / f"{name}.yaml", check_paths=False)
    assert sweep.name == name
    assert config_warnings(sweep) == []
    assert SweepConfig.from_dict(sweep.to_dict()) == sweep


def test_quickstart_needs_no_file_of_the_user() -> None:
    assert read_sweep(SHIPPED / "quickstart.yaml").trial.data.path is None


def test_ffhq_is_the_papers_protocol() -> None:
    sweep = read_sweep(SHIPPED / "ffhq.yaml", check_paths=False)
    trial = sweep.trial
    assert (trial.model.name, trial.data.sample_shape, trial.data.classes) == ("DiT-B/2", (4, 32, 32), 1)
    assert (trial.training.lr, trial.training.batch_size, trial.training.num_steps) == (1e-4, 256, 100_000)
    assert (trial.training.ema_decay, trial.training.weight_decay, trial.data.horizontal_flip) == (
        0.9999,
        0,
        True,
    )
    assert (trial.diffusion.schedule, trial.diffusion.num_timesteps) == ("cosine", 1000)
    assert (trial.sampling.sampler, trial.sampling.num_steps, sweep.objective) == ("ddpm", 250, "fid_10k")


def test_imagenet_is_the_papers_protocol() -> None:
    trial = read_sweep(SHIPPED / "imagenet.yaml", check_paths=False).trial
    assert (trial.model.name, trial.data.classes, trial.sampling.guidance_scale) == ("DiT-L/2", 1000, 1.5)
    assert trial.training.num_steps == 400_000


def test_a_shipped_file_without_its_data_says_which_folder_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ffhq.yaml:\d+: trial.data.path: 'data/ffhq256' does not exist"):
        read_sweep(SHIPPED / "ffhq.yaml")
    (tmp_path / "data" / "ffhq256").mkdir(parents=True)
    assert read_sweep(SHIPPED / "ffhq.yaml").trial.data.path == "data/ffhq256"


def test_a_missing_file_of_feature_weights_and_a_missing_vae_are_told(tmp_path: Path) -> None:
    text = "data: {name: folder, path: ., vae: ./no/vae, resolution: 32}\nmodel: {name: DiT-S/2}\n"
    with pytest.raises(ConfigError) as caught:
        read_trial(write(tmp_path, text + "evaluation: {feature_weights: no.pt}\n"))
    first, second = str(caught.value).splitlines()
    assert "file.yaml:1: data.vae: './no/vae' does not exist" in first
    assert "file.yaml:3: evaluation.feature_weights: 'no.pt' does not exist" in second


def test_numbers_and_words_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    text = (
        "training: {lr: 1e-4, weight_decay: .5, ema_warmup: true, gradient_clip: null, num_steps: 0x1000}\n"
    )
    training = read_trial(write(tmp_path, text + "evaluation: {every_steps: 010}\n")).training
    assert (training.lr, training.weight_decay, training.ema_warmup) == (1e-4, 0.5, True)
    assert (training.gradient_clip, training.num_steps) == (None, 4096)
    sweep = read_sweep(write(tmp_path, GOOD.replace("name: small", "name: on")))
    assert sweep.name == "on"


def test_several_problems_have_a_line_each_in_the_files_order(tmp_path: Path) -> None:
    text = GOOD.replace("beta: 0.8", "beta: 0").replace("name: small", "name: 7").replace("lr: 1e-3", "lr: x")
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    starts = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert starts == [f"{path}:1", f"{path}:15", f"{path}:22"]


def test_more_than_ten_problems_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n" + "".join(f"  key{i}: 1\n" for i in range(14)))
    with pytest.raises(ConfigError) as caught:
        read_trial(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 4 more problems"


def test_a_trials_own_json_is_read_back(tmp_path: Path) -> None:
    trial = TrialConfig()
    trial.save(tmp_path / "trial.json")
    assert read_trial(tmp_path / "trial.json") == trial


def test_a_sweeps_file_is_no_trials_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file.yaml:2: this is a sweep's file"):
        read_trial(write(tmp_path, GOOD))


def test_aliases_are_written_out(tmp_path: Path) -> None:
    text = GOOD.replace("low: 1, high: 8}", "low: 1, high: &most 8}").replace(
        "routing.alpha: 4", "routing.alpha: *most"
    )
    assert read_sweep(write(tmp_path, text)).search.starting_points[0]["routing.alpha"] == 8


def test_reading_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys; from dtr_ray.config.read import read_sweep; from dtr_ray.config.schema import schema; "
        f"read_sweep({str(SHIPPED / 'quickstart.yaml')!r}); "
        "sys.exit(bool({'torch', 'ray', 'mlflow', 'optuna', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
