"""Losses against the authors' numbers, and what they keep to."""

import math

import pytest
import torch
from golden import latents, load

from dtr_ray.config.weighting import MinSNRWeighting, P2Weighting, VanillaWeighting
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule, q_sample
from dtr_ray.diffusion.weightings import build_weights

TOLERANCE = {"mse": 1e-5, "vb": 1e-4, "loss": 2e-5}
CASES = {
    "constant": (VanillaWeighting(), {k: f"constant_{k}" for k in TOLERANCE}),
    "min_snr": (MinSNRWeighting(gamma=5), {k: f"min_snr_5_{k}" for k in TOLERANCE}),
    "p2": (
        P2Weighting(gamma=1, k=1),
        {"mse": "p2weight_1_1_INTENDED_mse", "vb": "p2weight_1_1_vb", "loss": "p2weight_1_1_INTENDED_loss"},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_losses_equal_the_authors(name, case, golden_dit):
    arrays, settings = load("losses")
    config, keys = CASES[case]
    model, schedule = golden_dit(settings["model"]), noise_schedule(name, 1000)
    losses = diffusion_losses(
        model, schedule, arrays["x_start"], arrays["t"], arrays["noise"], {"y": arrays["y"]},
        build_weights(config, schedule),
    )  # fmt: skip
    assert set(losses) == set(keys)
    for key, stem in keys.items():
        torch.testing.assert_close(losses[key], arrays[f"{name}_{stem}"], rtol=TOLERANCE[key], atol=0)
    losses["loss"].mean().backward()
    parameters = dict(model.named_parameters())
    for parameter in ("final_layer.linear.weight", "blocks.1.mlp.fc1.weight"):
        stem = {"constant": "constant", "min_snr": "min_snr_5"}.get(case)
        if stem is not None:
            expected = settings[f"{name}_{stem}_gradnorm_{parameter}"]
            assert parameters[parameter].grad.double().norm().item() == pytest.approx(expected, rel=1e-4)


def problem(seed=0, batch=6):
    schedule = noise_schedule("cosine", 1000)
    x, noise = latents(seed, (batch, 3, 4, 4)).clamp(-1, 1), latents(seed + 1, (batch, 3, 4, 4))
    return schedule, x, torch.tensor([0, 1, 2, 500, 998, 999])[:batch], noise


def test_the_golden_inputs_follow_their_recipe():
    arrays, settings = load("losses")
    shape = tuple(arrays["noise"].shape)
    assert torch.equal(latents(settings["model"]["nseed"], shape), arrays["noise"])
    assert torch.equal((0.5 * latents(settings["model"]["xseed"], shape)).clamp(-1, 1), arrays["x_start"])


def test_the_bound_equals_the_float64_divergence_of_two_normals():
    schedule, x, t, noise = problem()
    predicted, v = noise + 0.1 * latents(5, x.shape), latents(6, x.shape)
    losses = diffusion_losses(lambda x_t, t: torch.cat([predicted, v], 1), schedule, x, t, noise, {})
    abar, x64 = schedule.alphas_cumprod[t].view(-1, 1, 1, 1), x.double()
    x_t = abar.sqrt() * x64 + (1 - abar).sqrt() * noise
    image = (x_t - (1 - abar).sqrt() * predicted) / abar.sqrt()
    difference = schedule.posterior_mean_coef1[t].view(-1, 1, 1, 1) * (image - x64)
    lower = schedule.posterior_log_variance_clipped[t].view(-1, 1, 1, 1)
    upper = schedule.betas[t].log().view(-1, 1, 1, 1)
    model = (v + 1) / 2 * upper + (1 - v) / 2 * lower
    nats = 0.5 * (model - lower + (lower - model).exp() - 1 + difference**2 * (-model).exp())
    expected = nats.flatten(1).mean(1)[1:] / math.log(2)
    torch.testing.assert_close(losses["vb"][1:].double(), expected, rtol=1e-4, atol=0)


def test_the_bound_trains_the_variance_alone():
    schedule, x, t, noise = problem()
    output = latents(7, (6, 6, 4, 4)).requires_grad_()
    diffusion_losses(lambda x_t, t: output, schedule, x, t, noise, {})["vb"].sum().backward()
    assert torch.equal(output.grad[:, :3], torch.zeros(6, 3, 4, 4))
    assert output.grad.isfinite().all()
    assert (output.grad[:, 3:].flatten(1).abs().sum(1) > 0).all()


def test_without_a_variance_the_loss_is_the_noise_error_alone():
    schedule, x, t, noise = problem()
    losses = diffusion_losses(lambda x_t, t: noise + 2, schedule, x, t, noise, {})
    assert torch.equal(losses["vb"], torch.zeros(6))
    torch.testing.assert_close(losses["loss"], torch.full((6,), 4.0))


def test_the_model_sees_the_noisy_image_and_the_timestep():
    schedule, x, t, noise = problem()
    seen = {}

    def model(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return x_t

    diffusion_losses(model, schedule, x, t, noise, {"y": 3})
    torch.testing.assert_close(seen["x_t"], q_sample(schedule, x, t, noise))
    assert torch.equal(seen["t"], t)
    assert seen["y"] == 3


@pytest.mark.parametrize("channels", [1, 4, 9])
def test_an_output_of_another_size_is_refused(channels):
    schedule, x, t, noise = problem()
    with pytest.raises(ValueError, match=f"{channels} channels: it must have 3"):
        diffusion_losses(lambda x_t, t: torch.zeros(6, channels, 4, 4), schedule, x, t, noise, {})


def test_losses_are_float32_and_close_under_bfloat16_autocast():
    schedule, x, t, noise = problem()
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 6, 1)

    def model(x_t, t):
        return layer(x_t)

    exact = diffusion_losses(model, schedule, x, t, noise, {}, torch.ones(1000))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t).dtype == torch.bfloat16
        rough = diffusion_losses(model, schedule, x, t, noise, {}, torch.ones(1000))
    for key, value in rough.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[key], rtol=0.05, atol=0)
