"""Commands on prepared folders: everything that uses data works with them, and what is wrong ends at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from prepared_folders import FolderWriter, save_vae
from tiny_clip import CHANNELS, write_clip
from tiny_trials import METRIC, TINY

from dtr_ray import evaluate, sample, train
from dtr_ray.analysis.affinity import Settings, measure_affinity
from dtr_ray.config.base import override
from dtr_ray.data.manifest import caption_names
from dtr_ray.export.folder import export_model

COUNTS = [20, 20, 2]


def some_latents(count: int) -> np.ndarray:
    return np.random.default_rng(2).random((count, 2, 2, 4, 4, 4), np.float32) + 0.1


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderWriter]:
    """`pixels` and `latents` with classes, `captions` of pixels; the last two with references."""
    root = tmp_path_factory.mktemp("prepared")
    total, features = sum(COUNTS), np.random.default_rng(1).random((60, 1280), np.float32)
    pixels = np.random.default_rng(3).integers(0, 256, (total, 3, 32, 32), dtype=np.uint8)
    texts = [["seven"], ["one", "the seven"]] * (total // 2)
    tokens = np.random.default_rng(4).standard_normal((len(caption_names(texts)), 77, CHANNELS))
    found = {
        "pixels": FolderWriter(root / "pixels", COUNTS, num_classes=3).pixels(pixels),
        "latents": FolderWriter(root / "latents", COUNTS, num_classes=3)
        .latents(some_latents(total), save_vae(root / "vae"))
        .reference_of(features),
        "captions": FolderWriter(root / "captions", COUNTS)
        .pixels(pixels)
        .captions(texts, str(write_clip(root / "clip")), tokens.astype(np.float16))
        .reference_of(features),
    }
    for writer in found.values():
        writer.write()
    return found


@pytest.fixture(scope="module")
def trial_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes the YAML file of a tiny trial on a folder; returns its path."""

    def write(writer: FolderWriter, **changes: Any) -> str:
        path = tmp_path_factory.mktemp("trials") / "trial.yaml"
        data = writer.data(horizontal_flip=True)
        trial = override(TINY, {"data": data, "sampling.clip_denoised": False, **changes})
        path.write_text(yaml.safe_dump(trial))
        return str(path)

    return write


@pytest.fixture(scope="module", params=["pixels", "latents", "captions"])
def trained(
    request: pytest.FixtureRequest,
    writers: dict[str, FolderWriter],
    trial_file: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What `train` leaves behind."""
    folder = tmp_path_factory.mktemp("run") / request.param
    assert train.main([trial_file(writers[request.param]), "--output", str(folder)]) == 0
    return folder


def test_a_trained_model_is_evaluated_sampled_and_exported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert evaluate.main([str(trained)]) == 0
    assert capsys.readouterr().out.startswith(METRIC)
    grid = tmp_path / "grid.png"
    assert sample.main([str(trained), "--output", str(grid), "--num", "4"]) == 0
    assert Image.open(grid).mode == "RGB"
    export = export_model(trained, tmp_path / "model")
    images = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)(num_images=2, output_type="pt")
    assert images.images.shape == (2, 3, 32, 32)
    if trained.name == "captions":
        prompts = DiffusionPipeline.from_pretrained(export, trust_remote_code=True).config.prompts
        assert set(prompts) <= {"seven", "one"}


def test_gradients_are_measured_on_the_folder_s_images(trained: Path) -> None:
    settings = Settings(num_measured=3, num_batches=1, batch_size=4, sketch_size=100)
    assert np.isfinite(measure_affinity(trained, settings).matrix).all()


def test_trials_do_not_depend_on_where_shards_begin(
    writers: dict[str, FolderWriter], trial_file: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    if trained.name != "latents":
        return
    writer, one = writers["latents"], FolderWriter(tmp_path / "latents", [sum(COUNTS)], num_classes=3)
    assert writer.vae is not None
    one.latents(some_latents(sum(COUNTS)), Path(writer.vae.name))
    one.reference_of(np.random.default_rng(1).random((60, 1280), np.float32)).write()
    assert train.main([trial_file(one), "--output", str(tmp_path / "run")]) == 0
    weights = "checkpoints/00000006/ema.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (trained / weights).read_bytes()


def refused(capsys: pytest.CaptureFixture[str], words: list[str], folder: Path) -> str:
    """The one line of a command that has done nothing."""
    capsys.readouterr()
    assert train.main([*words, "--output", str(folder)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert not folder.exists()
    return text


def test_what_is_wrong_is_one_line_and_exit_code_2_before_any_work(
    writers: dict[str, FolderWriter],
    trial_file: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer, run = writers["latents"], tmp_path / "run"
    file = trial_file(writer)
    text = refused(capsys, [file, "--set", "evaluation.features=inception"], run)
    assert "choose evaluation.features: efficientnet_lite0" in text
    assert "prepared was 3" in refused(capsys, [file, "--set", "data.num_classes=4"], run)
    shard = writer.folder / "latents/00001.npy"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:1000])
        assert f"latents/00001.npy: 1000 bytes, not {len(whole)}" in refused(capsys, [file], run)
    finally:
        shard.write_bytes(whole)
