"""Reading weights from the files that the official code writes, and from safetensors."""

import argparse
import os
import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from dtr_ray.models import build_model, load_weights

TINY = {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 4, "patch_size": 2, "input_size": 8}


SWITCH = TINY | {"name": "Switch-DiT", "num_experts": 3}


def random_weights(seed, config=TINY):
    torch.manual_seed(seed)
    return {key: torch.randn_like(value) for key, value in build_model(config).state_dict().items()}


def training_file(weights):
    """What DTR's trainer saves, its optimizer state and command line included."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="DiT-S/2", lr=1e-4, flags=["a"], data=None)
    return {"model": random_weights(9), "ema": weights, "opt": optimizer.state_dict(), "args": args}


class Settings:
    """Stands for a class of OmegaConf, which pickles its objects as they are."""

    def __init__(self, **state):
        self.__dict__.update(state)


@pytest.fixture
def omegaconf_settings(monkeypatch):
    """What a training script with hydra keeps beside the weights; its classes are gone when it is read."""
    names = ("base.ContainerMetadata", "dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")
    kinds = {}
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    for name in names:
        place, kind = f"omegaconf.{name}".rsplit(".", 1)
        kinds[kind] = type(kind, (Settings,), {"__module__": place})
        module = ModuleType(place)
        setattr(module, kind, kinds[kind])
        monkeypatch.setitem(sys.modules, place, module)
    metadata = kinds["ContainerMetadata"](ref_type=Any, object_type=dict, cache=defaultdict(dict), flags={})
    numbers = kinds["ListConfig"](_content=[kinds["AnyNode"](_val=1)], _metadata=metadata)
    return kinds["DictConfig"](
        _content={"models": numbers}, _metadata=metadata, _parent=None, kind=(int, list)
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_training_files_with_hydras_settings_load_where_hydra_is_not(
    tmp_path, omegaconf_settings, monkeypatch, zipped
):
    weights = random_weights(1, SWITCH)
    tables = {"full_time": torch.arange(1000), "prior._unit_mapping": torch.ones(1000, 3)}
    content = training_file(weights | tables) | {"config": omegaconf_settings}
    content["model"] = random_weights(9, SWITCH) | tables
    torch.save(content, tmp_path / "0400000.pt", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    model = build_model(SWITCH)
    load_weights(model, tmp_path / "0400000.pt")
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("extra", ["prior.weight", "full_times", "routers.0.f_gate.3.weight"])
def test_of_a_switch_dit_file_the_fixed_tables_alone_are_passed_over(tmp_path, extra):
    torch.save(random_weights(1, SWITCH) | {extra: torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"{extra} is not a part of the model"):
        load_weights(build_model(SWITCH), tmp_path / "weights.pt")


def test_the_weights_of_several_experts_load_without_their_positions(tmp_path):
    config = TINY | {"name": "Multi-DiT", "num_experts": 2}
    weights = {key: value for key, value in random_weights(1, config).items() if "pos_embed" not in key}
    torch.save(weights, tmp_path / "weights.pt")
    model = build_model(config)
    load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize(("stem", "wrapped"), [("dit_forward", False), ("dtr_forward", True)])
def test_official_files_of_small_models_load_and_give_the_authors_outputs(
    tmp_path, golden, golden_weights, stem, wrapped
):
    meta, arrays = golden(stem)
    case = next(case for case in meta["cases"] if case["name"] == "cond_s002")
    # As the official file has them, positions are a parameter; DTR's routing buffers are in it too.
    weights = golden_weights(case, meta["seed"])
    weights["pos_embed"] = torch.nn.Parameter(torch.from_numpy(golden("dtr_forward")[1]["pos_embed"]), False)
    content = training_file(weights) | {"model": weights} if wrapped else weights
    torch.save(content, tmp_path / "DiT.pt")
    sizes = {"name": "DiT", "input_size": 8, "patch_size": 2, "hidden_size": meta["hidden"]}
    sizes |= {"depth": meta["depth"], "num_heads": meta["heads"], "num_classes": case["num_classes"]}
    model = build_model(sizes, {"name": "dtr" if stem == "dtr_forward" else "none"})
    load_weights(model.eval(), tmp_path / "DiT.pt")
    with torch.no_grad():
        out = model(*(torch.from_numpy(arrays[key]) for key in ("x", "t", "y")))
    expected = torch.from_numpy(arrays["cond_s002_out"])
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


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
