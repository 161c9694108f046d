"""VAE and text encoder of the released ones' architecture, small and random, from a hub and from folders."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import CHANNELS, write_clip
from tiny_hub import COMMIT, TinyHub, tiny_hub, write_vae
from tiny_preparations import prepare_config, prepare_here

from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.data.latents import LatentData, decode_latents, load_vae, vae_digest
from dtr_ray.data.text import load_text_encoder
from dtr_ray.weights.offline import offline

VAE, CLIP, WHOLE = "artists/vae", "artists/clip", "artists/whole"
SCALE = 0.18215
# What the blocks of the middle were called when the released VAE was written.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `vae` and `clip` as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("released")
    write_vae(folder / "vae")
    write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyHub]:
    """Has the same, each in its repository, and both in that of a whole pipeline."""
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder / "vae", whole / "vae")
    for part in ("text_encoder", "tokenizer"):
        (whole / part).mkdir()
    for file in (folder / "clip").iterdir():
        part = "text_encoder" if file.name in ("config.json", "model.safetensors") else "tokenizer"
        shutil.copy(file, whole / part)
    (whole / "model_index.json").write_text("{}")
    with tiny_hub() as server, pytest.MonkeyPatch.context() as patch:
        server.add(VAE, folder / "vae")
        server.add(CLIP, folder / "clip")
        server.add(WHOLE, whole, safety_checker__model=b"x")
        patch.delenv("HF_HUB_OFFLINE")
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("DTR_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of soft colours, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    for number, colours in enumerate(noise):
        Image.fromarray(colours).resize((40, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"the hand {number}\nseven\n")
    return folder


def config_of(pictures: Path, **changes: object) -> DataConfig:
    return DataConfig.from_dict({"name": "folder", "path": str(pictures), "resolution": 32, **changes})


def sources(folder: Path, name: str, part: str) -> list[str]:
    """All that mean the same weights."""
    return [str(folder / part), name, f"{name}@main", f"{name}@{COMMIT}", WHOLE]


def direct(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)


def test_one_vae_under_all_its_names(hub: TinyHub, folder: Path, pictures: Path) -> None:
    expected = vae_digest(direct(folder))
    for source in sources(folder, VAE, "vae"):
        assert vae_digest(load_vae(config_of(pictures, vae=source))) == expected


@pytest.fixture(scope="module")
def latents(hub: TinyHub, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentData:
    data = load_images(config_of(pictures, vae=VAE), tmp_path_factory.mktemp("latents"))
    assert isinstance(data, LatentData)
    return data


def test_encoding_agrees_with_diffusers(latents: LatentData, folder: Path) -> None:
    indices = torch.arange(5)
    pixels = latents.pixels(indices).float() / 127.5 - 1
    for flip in (False, True):
        posterior = direct(folder).encode(pixels.flip(-1) if flip else pixels).latent_dist
        flips = torch.full((5,), flip)
        torch.testing.assert_close(
            latents.batch(indices, flips), posterior.mean * SCALE, rtol=1e-5, atol=1e-6
        )
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        expected = (posterior.mean + posterior.std * noise) * SCALE
        drawn = latents.batch(indices, flips, torch.Generator().manual_seed(1))
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)
    assert posterior.std.min() > 0
    assert (latents.batch(indices) - latents.batch(indices, flips)).abs().max() > 1e-3


def test_decoding_and_its_error_agree_with_diffusers(latents: LatentData, folder: Path) -> None:
    indices = torch.arange(5)
    original = latents.pixels(indices)
    pixels = latents.to_pixels(latents.batch(indices))
    vae = direct(folder)
    expected = vae.decode(vae.encode(original.float() / 127.5 - 1).latent_dist.mean).sample
    expected = (expected.clamp(-1, 1) + 1) * 127.5
    assert (pixels.dtype, pixels.shape) == (torch.uint8, original.shape)
    assert (pixels.float() - expected).abs().max() <= 0.51  # rounded, once
    error = (pixels.float() - original.float()).square().mean()
    torch.testing.assert_close(
        error, (expected.round() - original.float()).square().mean(), rtol=1e-4, atol=0.0
    )
    assert torch.equal(pixels, decode_latents(vae, latents.batch(indices), SCALE))


def old_vae(folder: Path, target: Path) -> Path:
    """Names of the weights as of 2022, in a pickle."""
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in OLD_NAMES.items():
        weights = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): w for key, w in weights.items()
        }
    assert any(".query." in key for key in weights)
    target.mkdir()
    shutil.copy(folder / "vae" / "config.json", target)
    torch.save(weights, target / "diffusion_pytorch_model.bin")
    return target


@pytest.mark.parametrize("on_hub", [False, True])
def test_the_released_vaes_old_names_and_pickles_are_read(
    hub: TinyHub, folder: Path, pictures: Path, tmp_path: Path, on_hub: bool
) -> None:
    old = old_vae(folder, tmp_path / "old")
    hub.add("artists/old", old)
    source = "artists/old" if on_hub else str(old)
    assert vae_digest(load_vae(config_of(pictures, vae=source))) == vae_digest(direct(folder))


class _Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["HARM"],)


def test_a_pickle_is_never_run(
    hub: TinyHub, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    for name, part, file in (
        ("vae", "vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "clip", "pytorch_model.bin"),
    ):
        bad = tmp_path / part
        shutil.copytree(folder / part, bad, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save({"x": _Harmful()}, bad / file)
        hub.add(f"artists/bad-{part}", bad)
        for source in (f"artists/bad-{part}", str(bad)):
            config = config_of(pictures, **{name: source, "text_channels": CHANNELS})
            with pytest.raises(ValueError, match=rf"data\.{name} .* cannot be loaded"):
                load_vae(config) if name == "vae" else load_text_encoder(config)
    assert not (tmp_path / "harm").exists()


def test_a_vae_that_lacks_weights_is_refused(folder: Path, pictures: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(folder / "vae", tmp_path / "vae"))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights decoder\.conv_in\.weight"):
        load_vae(config_of(pictures, vae=str(vae)))


def test_a_vae_of_several_files_is_read(hub: TinyHub, folder: Path, pictures: Path, tmp_path: Path) -> None:
    direct(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    hub.add("artists/parts", tmp_path)
    assert vae_digest(load_vae(config_of(pictures, vae="artists/parts"))) == vae_digest(direct(folder))


def tokens_of(data: ImageData) -> torch.Tensor:
    assert data.captions is not None
    return data.captions.tokens(data.captions.drawn(torch.arange(5), torch.linspace(0, 0.99, 5)))


def test_one_text_encoder_under_all_its_names(
    hub: TinyHub, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    words = tokenizer(["the hand 0", "the hand 1"], padding="max_length", max_length=77, return_tensors="pt")
    expected = CLIPTextModel.from_pretrained(folder / "clip")(words.input_ids).last_hidden_state
    for source in sources(folder, CLIP, "clip"):
        config = config_of(pictures, text_encoder=source, text_channels=CHANNELS)
        tokens = tokens_of(load_images(config, tmp_path / "cache"))
        torch.testing.assert_close(tokens[:2].float(), expected.detach(), atol=5e-3, rtol=1e-3)
    assert len(list((tmp_path / "cache").glob("captions-*.npy"))) == 1


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_a_prepared_folder_holds_what_load_images_gives(
    hub: TinyHub, folder: Path, pictures: Path, tmp_path: Path, source: str
) -> None:
    names = (VAE, CLIP) if source == "hub" else (str(folder / "vae"), str(folder / "clip"))
    keys = {"vae": names[0], "text_encoder": names[1], "text_channels": CHANNELS}
    config = prepare_config(pictures, tmp_path, resolution=32, shard_images=3, keep_pixels=True, **keys)
    manifest = prepare_here(config)
    trial = config.data(str(tmp_path / config.name), 1)
    with offline():
        prepared = load_images(trial, tmp_path / "cache")
        expected = load_images(config_of(pictures, **keys), tmp_path / "cache")
    assert manifest.vae is not None
    assert manifest.vae.digest == vae_digest(direct(folder))
    indices, flip = torch.arange(5), torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(
        prepared.batch(indices, flip), expected.batch(indices, flip), rtol=1e-5, atol=1e-6
    )
    pixels = (
        prepared.to_pixels(prepared.batch(indices)).int(),
        expected.to_pixels(expected.batch(indices)).int(),
    )
    assert (pixels[0] - pixels[1]).abs().max() <= 1
    assert torch.equal(tokens_of(prepared), tokens_of(expected))


def test_the_hub_is_asked_for_each_file_once(hub: TinyHub, pictures: Path) -> None:
    # Whatever tests have asked in this process before.
    for _ in range(2):
        for source in (VAE, WHOLE):
            load_vae(config_of(pictures, vae=source))
        for source in (CLIP, WHOLE):
            load_text_encoder(config_of(pictures, text_encoder=source, text_channels=CHANNELS))
    asked = {path: count for path, count in hub.asked.items() if "/resolve/" in path}
    assert set(asked.values()) == {1}
    names = {path.partition(f"/resolve/{COMMIT}/")[2] for path in asked}
    assert {"config.json", "vae/config.json", "merges.txt"} <= names
    assert "safety_checker/model" not in names
