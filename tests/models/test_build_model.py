"""build_model: names, plain values, routing."""

import pytest
import torch

from dtr_ray.config import ModelConfig
from dtr_ray.config.routing import DTRRouting, NoRouting
from dtr_ray.models import PRESETS, build_model
from dtr_ray.models.routing import dtr_mask, random_mask

TINY = {"name": "DiT", "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8}


@pytest.mark.parametrize("name", [name for name in PRESETS if "DiT" in name])
def test_every_preset_builds_with_its_sizes(name):
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name))
    model = model.experts[0] if name.startswith("Multi") else model
    sizes = PRESETS[name]
    assert (model.hidden_size, len(model.blocks), model.patch_size) == (
        sizes.hidden_size, sizes.depth, sizes.patch_size,
    )  # fmt: skip
    assert model.blocks[0].attn.num_heads == sizes.num_heads
    assert (model.input_size, model.in_channels, model.num_classes, model.out_channels) == (32, 4, 1000, 8)


def test_explicit_sizes_go_before_the_presets():
    with torch.device("meta"):
        model = build_model({"name": "DiT-S/2", "depth": 3, "in_channels": 1, "num_classes": 10})
    assert (model.hidden_size, len(model.blocks), model.in_channels, model.num_classes) == (384, 3, 1, 10)


def test_plain_values_reach_the_model():
    values = {"mlp_ratio": 2, "class_dropout_prob": 0, "learn_sigma": False, "num_classes": 1}
    model = build_model(TINY | values)
    assert model.blocks[0].mlp.fc1.out_features == 64
    assert model.null_label is None
    assert model.out_channels == 4
    assert model.mask is None
    out = model(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (None, None),
        (NoRouting(), None),
        ({"name": "none"}, None),
        (DTRRouting(alpha=2.0, beta=0.5), dtr_mask(20, 32, 2.0, 0.5)),
        ({"name": "dtr", "alpha": 2, "beta": 0.5}, dtr_mask(20, 32, 2.0, 0.5)),
        ({"name": "dtr", "beta": 1.0}, None),
        ({"name": "random", "beta": 0.5, "seed": 3}, random_mask(20, 32, 0.5, 3)),
    ],
)
def test_the_routing_gives_the_mask(routing, expected):
    model = build_model(TINY, routing, num_timesteps=20)
    assert model.mask is None if expected is None else torch.equal(model.mask, expected)


@pytest.mark.parametrize(
    ("config", "routing", "message"),
    [
        ({"name": "DiT-M/2"}, None, "'DiT-M/2' is no model; did you mean DiT-"),
        ({"name": "DiT"}, None, "needs hidden_size"),
        (TINY | {"heads": 4}, None, "heads"),
        (TINY | {"num_heads": 3}, None, "hidden_size is 32: it must be a multiple of num_heads 3"),
        (TINY, {"name": "dtr", "beta": 0.0}, "beta"),
        (TINY, {"name": "dtr", "beta": 0.01}, "at least one channel must be on"),
        (TINY, {"name": "best"}, "best"),
    ],
)
def test_mistakes_are_named(config, routing, message):
    with pytest.raises(ValueError, match=message):
        build_model(config, routing)
