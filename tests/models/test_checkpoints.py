"""Reading weights from the files that the official code writes, and from safetensors."""

import argparse
import os

import pytest
import safetensors.torch
import torch

from dtr_ray.models import build_model, load_weights

TINY = {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 4, "patch_size": 2, "input_size": 8}


def random_weights(seed):
    torch.manual_seed(seed)
    return {key: torch.randn_like(value) for key, value in build_model(TINY).state_dict().items()}


def training_file(weights):
    """What DTR's trainer saves, its optimizer state and command line included."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="DiT-S/2", lr=1e-4, flags=["a"], data=None)
    return {"model": random_weights(9), "ema": weights, "opt": optimizer.state_dict(), "args": args}


@pytest.mark.parametrize(
    "wrap",
    [lambda w: w, lambda w: {"model": w}, lambda w: {"ema": w, "model": random_weights(9)}, training_file],
    ids=["bare", "model", "ema before model", "training file"],
)
def test_torch_files_load_whatever_is_around_the_weights(tmp_path, wrap):
    weights = random_weights(1)
    content = wrap(weights | {"blocks.0.routing._unit_mapping": torch.ones(10, 32)})
    torch.save(content, tmp_path / "weights.pt")
    model = build_model(TINY)
    load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_safetensors_load_without_the_fixed_positions(tmp_path):
    weights = random_weights(1)
    del weights["pos_embed"]
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    model = build_model(TINY)
    positions = model.pos_embed.clone()
    load_weights(model, str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert torch.equal(model.pos_embed, positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.attn.qkv.weight": torch.ones(96, 16)},
            r"attn.qkv.weight has shape \(96, 16\); .* \(96, 32\)",
        ),
        ({"blocks.0.attn.qkv.weight": None}, "blocks.0.attn.qkv.weight is missing"),
        ({"blocks.7.attn.qkv.weight": torch.ones(1)}, "blocks.7.attn.qkv.weight is not a part of the model"),
    ],
)
def test_the_first_key_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, change, message):
    weights = {key: value for key, value in (random_weights(1) | change).items() if value is not None}
    torch.save(weights, tmp_path / "weights.pt")
    model = build_model(TINY)
    before = model.pos_embed.clone()
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.pos_embed, before)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, "weights.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_weights(build_model(TINY), "weights.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_damaged_file_is_a_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_weights(build_model(TINY), tmp_path / name)


def test_a_missing_file_and_a_file_without_weights_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.pt: no such checkpoint file"):
        load_weights(build_model(TINY), tmp_path / "absent.pt")
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(build_model(TINY), tmp_path / "state.pt")
