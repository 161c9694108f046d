import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dtr_ray.config import TrialConfig
from dtr_ray.export.folder import export_model
from dtr_ray.export.trained import build_pipeline, open_model
from dtr_ray.models import build_model
from dtr_ray.training import latest_checkpoint

IN_A_NEW_PROCESS = """
import sys
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
torch.save(pipeline(num_images=5, output_type="pt").images, sys.argv[2])
images = pipeline(class_labels=[3, 7], guidance_scale=2.0, num_inference_steps=3).images
print(type(pipeline).__name__, len(images), images[0].size)
"""


def load_in_a_new_process(export: Path, output: Path, home: Path) -> str:
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(export), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_diffusers_loads_the_export_in_a_new_process_and_draws_the_same(
    export: Path, trial: Path, tmp_path: Path
):
    told = load_in_a_new_process(export, tmp_path / "images.pt", tmp_path / "home")
    assert told == "DTRPipeline 2 (8, 8)"
    images = torch.load(tmp_path / "images.pt")
    expected = build_pipeline(open_model(trial))(num_images=5, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_pipeline_saved_again_loads_again(export: Path, tmp_path: Path):
    build_pipeline(open_model(export)).save_pretrained(tmp_path / "again")
    assert load_in_a_new_process(tmp_path / "again", tmp_path / "images.pt", tmp_path).startswith(
        "DTRPipeline"
    )


def test_weights_are_the_average_under_the_official_names(config: TrialConfig, trial: Path, export: Path):
    weights = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    checkpoint = latest_checkpoint(trial)
    assert checkpoint is not None
    expected = load_file(checkpoint / "ema.safetensors")
    assert {k: v for k, v in weights.items() if not torch.equal(v, expected[k])} == {}
    model = build_model(config.resolved_model, config.routing)
    model.load_state_dict(weights)


def test_folder_holds_what_its_readers_need(config: TrialConfig, export: Path):
    assert TrialConfig.load(export / "trial.json") == config
    assert Image.open(export / "samples.png").width > 64
    index = json.loads((export / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == ["pipeline", "DTRPipeline"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    card = (export / "README.md").read_text(encoding="utf-8")
    for part in (
        "# tiny",
        "dtr (alpha 4, beta 0.8, rule",
        "fd: 1.235",
        "trust_remote_code=True",
        "digits (8 x 8",
    ):
        assert part in card


def test_an_export_opens_as_the_trial_does(config: TrialConfig, trial: Path, export: Path):
    ours, theirs = open_model(export), open_model(trial)
    assert ours.config == theirs.config == config
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name])
    assert not ours.model.training


def test_exporting_again_replaces_an_export_and_nothing_else(export: Path, trial: Path, tmp_path: Path):
    folder = export_model(export, tmp_path / "export")
    (folder / "stale").touch()
    export_model(trial, folder)
    assert not (folder / "stale").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
        export_model(trial, other)
    assert (other / "notes.txt").read_text(encoding="utf-8") == "keep"


def test_the_best_checkpoint_of_a_trial_is_opened(trial: Path, tmp_path: Path):
    checkpoint = latest_checkpoint(trial)
    assert open_model(trial).folder == checkpoint
    with pytest.raises(ValueError, match="holds no trained model"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        open_model(tmp_path / "absent")
