"""Noise schedules against the authors' numbers, and the forward process."""

import pytest
import torch
from golden import latents, load

from dtr_ray.diffusion.noise import noise_schedule, q_sample

VECTORS = [
    "betas",
    "alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_equal_the_authors(name, vector):
    arrays, settings = load("losses")
    ours = getattr(noise_schedule(name, 1000), vector)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours[arrays[f"{name}_idx"]], arrays[f"{name}_{vector}"], rtol=1e-10, atol=0)
    assert ours.sum().item() == pytest.approx(settings[f"{name}_{vector}_sum"], rel=1e-10)


def test_both_names_of_the_cosine_schedule_give_the_same():
    assert torch.equal(noise_schedule("cosine", 50).betas, noise_schedule("squaredcos_cap_v2", 50).betas)


@pytest.mark.parametrize(("name", "least"), [("cosine", 2), ("linear", 21)])
def test_short_schedules_stay_inside_their_ranges(name, least):
    for num_timesteps in (least, least + 1, 50):
        schedule = noise_schedule(name, num_timesteps)
        assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
        assert ((schedule.alphas_cumprod > 0) & (schedule.alphas_cumprod < 1)).all()
        assert (schedule.snr.diff() < 0).all()
    with pytest.raises(ValueError, match=str(least - 1)):
        noise_schedule(name, least - 1)


def test_an_unknown_schedule_is_named_beside_the_known():
    with pytest.raises(ValueError, match=r"'cosin'.*linear, cosine"):
        noise_schedule("cosin", 1000)


def test_q_sample_keeps_the_variance_of_the_float64_formula():
    schedule = noise_schedule("cosine", 1000)
    x, noise, t = latents(1, (3, 2, 4, 4)), latents(2, (3, 2, 4, 4)), torch.tensor([0, 500, 999])
    abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = abar.sqrt() * x + (1 - abar).sqrt() * noise
    got = q_sample(schedule, x, t, noise)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_coefficients_are_copied_to_a_device_once():
    schedule = noise_schedule("cosine", 1000)
    first = schedule.coefficients(torch.device("cpu"))
    assert schedule.to("cpu").coefficients(torch.device("cpu")) is first


def test_coefficients_made_in_inference_mode_serve_training():
    schedule = noise_schedule("cosine", 1000)
    with torch.inference_mode():
        schedule.to("cpu")
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    q_sample(schedule, x, torch.tensor([3]), torch.ones(1, 1, 2, 2)).sum().backward()
    assert x.grad is not None
