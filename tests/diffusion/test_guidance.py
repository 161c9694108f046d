"""Classifier-free guidance: which channels are guided, and what stands for no condition."""

from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from dtr_ray.config import SamplingConfig
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.diffusion.samplers import guide, sample
from dtr_ray.models.dit import DiT

COSINE = noise_schedule("cosine", 1000)


@pytest.mark.parametrize("name", ["cond_s002", "cond_s02"])
def test_guiding_three_channels_is_the_official_dits(name: str):
    arrays, meta = golden.load("dit_forward")
    case = next(case for case in meta["cases"] if case["name"] == name)
    model = DiT(8, 2, 4, 64, 3, 4, 5).eval()
    weights = golden.fill_weights(model.state_dict(), 101, case["weight_scale"])
    model.load_state_dict(weights)
    half = arrays["x"][:3]
    with torch.no_grad():
        output = model(torch.cat([half, half]), arrays[f"{name}_cfg_t"], arrays[f"{name}_cfg_y"])
    expected = arrays[f"{name}_cfg3ch_out"]
    tolerance = (5e-6 if case["weight_scale"] == 0.02 else 5e-5) * case["out_abs_max"]
    # The official output holds the guided channels twice, and the others of both halves.
    torch.testing.assert_close(guide(output, 3, 1.5), expected[:3], rtol=0, atol=tolerance)
    assert (guide(output, 4, 1.5) - expected[:3]).abs().max() > 100 * tolerance


def test_guidance_is_the_formula_and_leaves_the_other_channels_to_the_condition():
    output = torch.randn(6, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    own, null = output[:3], output[3:]
    expected = torch.cat([(null + 2.5 * (own - null))[:, :3], own[:, 3:]], dim=1)
    torch.testing.assert_close(guide(output, 3, 2.5), expected)
    torch.testing.assert_close(guide(output, 8, 1.0), own)
    # Three of one channel are all.
    torch.testing.assert_close(guide(output[:, :1], 3, 2.5), guide(output[:, :1], 1, 2.5))


class LabelModel:
    """Predicts 1 for a label and 0 for the null label, on all channels; the variance too."""

    null_label = 3
    null_tokens: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        there = (y != 3) if y.ndim == 1 else y.flatten(1).any(1)
        noise = there.float().view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([noise, noise], dim=1)


class TextModel(LabelModel):
    null_label = None  # type: ignore[assignment]
    null_tokens = torch.zeros(5, 2)


def drawn(model: Any, labels: Tensor, **sampling: Any) -> Tensor:
    settings = SamplingConfig.from_dict({"sampler": "ddim", "num_steps": 1, **sampling})
    return draw(
        model,
        COSINE,
        settings,
        (4, 2, 2),
        seed=0,
        indices=torch.arange(2),
        labels=labels,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("model", "labels"),
    [(LabelModel(), torch.zeros(2, dtype=torch.int64)), (TextModel(), torch.ones(2, 5, 2).half())],
    ids=["labels", "tokens"],
)
def test_guidance_channels_say_how_many_are_guided(model: Any, labels: Tensor):
    plain, every, three = (
        drawn(model, labels, **settings)
        for settings in (
            {},
            {"guidance_scale": 3.0},
            {"guidance_scale": 3.0, "guidance_channels": "first_three"},
        )
    )
    assert not torch.isclose(every, plain).any()
    assert torch.equal(three[:, :3], every[:, :3])
    assert torch.equal(three[:, 3:], plain[:, 3:])


def test_null_tokens_of_another_shape_are_refused():
    z, y = torch.zeros(2, 4, 2, 2), torch.ones(2, 6, 2)
    with pytest.raises(ValueError, match=r"no caption has tokens \(5, 2\), the captions \(6, 2\)"):
        sample(
            TextModel(),
            COSINE,
            z,
            y,
            sampler="ddim",
            num_steps=2,
            guidance_scale=2.0,
            null_label=torch.zeros(5, 2),
        )
