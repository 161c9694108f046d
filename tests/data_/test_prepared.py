"""Trials' view of prepared folders: the content is the shards', and what does not fit is refused at once."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_folders import FolderWriter, save_vae
from tiny_clip import write_clip

from dtr_ray.config import DataConfig
from dtr_ray.data import check_data, load_images
from dtr_ray.data.captions import Captions, sample_images
from dtr_ray.data.identity import data_identity
from dtr_ray.data.images import sample_captions
from dtr_ray.data.latents import LatentData
from dtr_ray.evaluation.features import build_extractor
from dtr_ray.evaluation.references import check_references, reference_features, reference_statistics

COUNTS = [5, 1, 4]


def some_pixels(count: int = 10, resolution: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, resolution, resolution), dtype=np.uint8)


def some_latents(count: int = 10, sides: int = 2, dtype: type = np.float32) -> np.ndarray:
    values = np.random.default_rng(2).random((count, sides, 2, 4, 4, 4)) + 0.1
    return values.astype(dtype)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def of_latents(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderWriter:
    """A folder without pixels, and with references of one extractor."""
    writer = FolderWriter(tmp_path_factory.mktemp("prepared") / "faces", COUNTS, num_classes=3)
    writer.latents(some_latents(), vae).reference(some_pixels()).write()
    return writer


@pytest.fixture(scope="module")
def of_pixels(tmp_path_factory: pytest.TempPathFactory) -> FolderWriter:
    writer = FolderWriter(tmp_path_factory.mktemp("prepared") / "pixels", COUNTS, num_classes=2)
    writer.pixels(some_pixels()).write()
    return writer


def test_pixels_are_the_shards_in_order(of_pixels: FolderWriter, shared_cache: Path) -> None:
    config = of_pixels.config(horizontal_flip=True)
    data = load_images(config, shared_cache)
    indices = torch.tensor([9, 0, 5, 6, 4])
    assert (len(data), data.num_classes, data.num_channels) == (10, 2, 3)
    assert torch.equal(data.pixels(indices), torch.from_numpy(some_pixels())[indices])
    assert data.labels.tolist() == [0, 1] * 5
    flip = torch.tensor([True, False, False, True, False])
    x = data.batch(indices, flip)
    assert x.shape[1:] == config.sample_shape
    expected = torch.from_numpy(some_pixels())[indices].float() / 127.5 - 1
    assert torch.equal(x[~flip], expected[~flip])
    assert torch.equal(x[flip], expected[flip].flip(-1))


def test_the_identity_is_the_manifest_s(of_latents: FolderWriter, shared_cache: Path) -> None:
    assert load_images(of_latents.config(), shared_cache).identity == "prepared-32-faces"
    assert data_identity(of_latents.config(), shared_cache) == "prepared-32-faces"


def test_latents_are_drawn_from_the_posterior_of_the_side_that_is_asked_for(
    of_latents: FolderWriter, shared_cache: Path
) -> None:
    data = load_images(of_latents.config(horizontal_flip=True), shared_cache)
    assert isinstance(data, LatentData)
    indices, flip = torch.tensor([8, 5, 0]), torch.tensor([True, False, True])
    mean, std = torch.from_numpy(some_latents())[indices, flip.long()].unbind(1)
    assert torch.equal(data.batch(indices, flip), mean * 0.5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    drawn = data.batch(indices, flip, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, (mean + std * noise) * 0.5)
    assert data.to_pixels(drawn).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="keeps latents alone"):
        data.pixels(indices)


def test_latents_in_half_precision_become_float32(vae: Path, tmp_path: Path, shared_cache: Path) -> None:
    writer = FolderWriter(tmp_path / "half", COUNTS).latents(some_latents(dtype=np.float16), vae)
    writer.write()
    x = load_images(writer.config(), shared_cache).batch(torch.tensor([7, 2]), None, torch.Generator())
    assert x.dtype == torch.float32


def test_latents_without_mirrored_ones_are_refused_to_who_flips(
    vae: Path, tmp_path: Path, shared_cache: Path
) -> None:
    writer = FolderWriter(tmp_path / "plain", COUNTS).latents(some_latents(sides=1), vae)
    writer.write()
    assert load_images(writer.config(), shared_cache).batch(torch.tensor([7])).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="horizontal_flip"):
        check_data(writer.config(horizontal_flip=True))


def test_another_vae_than_the_one_of_the_latents_is_refused(
    of_latents: FolderWriter, vae: Path, shared_cache: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = vae / "diffusion_pytorch_model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    try:
        with pytest.raises(ValueError, match="other weights than the VAE that made the latents"):
            load_images(of_latents.config(), shared_cache)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resolution": 64}, r"data\.resolution is 64, prepared was 32"),
        ({"num_classes": 5}, r"data\.num_classes is 5, prepared was 3"),
        ({"num_classes": None}, r"data\.num_classes is 1, prepared was 3"),
        ({"vae": None}, r"data\.vae is null, prepared was "),
        ({"vae": "other/vae"}, r"data\.vae is 'other/vae', prepared was "),
        ({"latent_scale": 0.18215}, r"data\.latent_scale is 0\.18215, prepared was 0\.5"),
        (
            {"num_classes": None, "text_encoder": "./clip"},
            r"data\.text_encoder is '\./clip', prepared was null",
        ),
    ],
)
def test_each_key_is_compared_with_the_manifest_in_one_line(
    of_latents: FolderWriter, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        check_data(of_latents.config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_damaged_shard_is_named_before_any_work(
    of_pixels: FolderWriter, damage: str, shared_cache: Path
) -> None:
    path = of_pixels.folder / "pixels/00001.npy"
    whole = path.read_bytes()
    try:
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(whole[:-1] if damage == "cut" else whole + b"0")
        with pytest.raises(
            ValueError, match=r"is damaged: pixels/00001\.npy: .*prepare.* --verify"
        ) as caught:
            check_data(of_pixels.config())
        with pytest.raises(ValueError, match=re.escape(str(caught.value))):
            load_images(of_pixels.config(), shared_cache)
    finally:
        path.write_bytes(whole)
    check_data(of_pixels.config())


def test_a_folder_that_is_none_or_not_complete_is_told(tmp_path: Path) -> None:
    config = DataConfig(name="prepared", path=str(tmp_path / "nowhere"), resolution=32)
    with pytest.raises(ValueError, match="nowhere does not exist on "):
        check_data(config)
    config = DataConfig(name="prepared", path=str(tmp_path), resolution=32)
    with pytest.raises(ValueError, match="is not a prepared folder"):
        check_data(config)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ValueError, match="is not complete"):
        check_data(config)


def test_the_check_reads_no_shard_and_loads_no_network(of_latents: FolderWriter) -> None:
    code = (
        "import json, sys\n"
        "from dtr_ray.config import DataConfig\n"
        "from dtr_ray.data import check_data\n"
        "check_data(DataConfig.from_dict(json.loads(sys.argv[1])))\n"
        "assert not {'diffusers', 'transformers', 'timm', 'ray'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(of_latents.data())]
    subprocess.run(command, check=True)


def test_references_come_from_the_folder(
    of_latents: FolderWriter, tmp_path: Path, shared_cache: Path
) -> None:
    data = load_images(of_latents.config(), shared_cache)
    extractor = build_extractor("efficientnet_lite0", None, "cpu")
    own = extractor(torch.from_numpy(some_pixels())).double().numpy()
    found = reference_statistics(data, extractor, tmp_path)
    np.testing.assert_allclose(found.mu, own.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.sigma, np.cov(own, rowvar=False), rtol=1e-5, atol=1e-9)
    assert found.num_images == 10
    features = reference_features(data, extractor, tmp_path)
    assert sorted(map(tuple, features[:, :3])) == sorted(map(tuple, own[:, :3].astype(np.float32)))
    assert not list(tmp_path.iterdir())


def test_an_extractor_without_references_is_refused_where_it_has_no_pixels_to_look_at(
    of_latents: FolderWriter, of_pixels: FolderWriter
) -> None:
    check_references(of_latents.config(), "efficientnet_lite0")
    check_references(of_pixels.config(), "inception")
    check_references(DataConfig(), "inception")
    says = (
        r"evaluation\.features is inception, but .* choose evaluation\.features: efficientnet_lite0, or "
        r"prepare the data again with features: \[efficientnet_lite0, inception\]"
    )
    with pytest.raises(ValueError, match=says):
        check_references(of_latents.config(), "inception")


def test_captions_and_their_tokens_come_from_the_folder(tmp_path: Path, shared_cache: Path) -> None:
    texts = [["one", "two"], ["three"], ["", "one"], ["four"]]
    clip = str(write_clip(tmp_path / "clip"))
    tokens = np.random.default_rng(0).standard_normal((5, 77, 24)).astype(np.float16)
    writer = FolderWriter(tmp_path / "texts", [1, 3]).pixels(some_pixels(4)).captions(texts, clip, tokens)
    writer.write()
    data = load_images(writer.config(), shared_cache)
    captions = data.captions
    assert isinstance(captions, Captions)
    assert captions.texts(torch.arange(5)) == ["", "four", "one", "three", "two"]
    numbers = captions.drawn(torch.tensor([0, 0, 1, 2]), torch.tensor([0.0, 0.9, 0.5, 0.1]))
    assert captions.texts(numbers) == ["one", "two", "three", ""]
    assert torch.equal(captions.tokens(numbers), torch.from_numpy(tokens)[numbers])
    order = sample_images(torch.arange(3), 4).tolist()
    assert sample_captions(writer.config(), 3, shared_cache) == [texts[i][0] for i in order]
    with pytest.raises(ValueError, match=r"data\.text_channels is 768, prepared was 24"):
        check_data(writer.config(text_channels=768))
