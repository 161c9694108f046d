"""Samplers against the authors' trajectories and diffusers' own loops, and what every sampler keeps to."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from golden import latents, load
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.diffusion.samplers import SAMPLERS, SampleNoise, sample, sampling_timesteps

COSINE = noise_schedule("cosine", 1000)
quick = settings(derandomize=True, deadline=None, max_examples=40)


def trajectory(model, *args, **kwargs):
    """What `sample` returns, and x after each step."""
    inputs = []

    def spy(x, t, y):
        inputs.append(x.clone())
        return model(x, t, y)

    final = sample(spy, *args, **kwargs)
    return torch.stack([*inputs[1:], final])


def assert_steps_close(ours, expected, relative):
    """Each step within `relative` of the largest value of that step."""
    assert ours.shape == expected.shape
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def analytic(schedule):
    scale = (1 - schedule.alphas_cumprod).sqrt().float()
    return lambda x, t, y: torch.cat([scale[t].view(-1, 1, 1, 1) * x, torch.tanh(x)], dim=1)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("name", ["cosine", "linear"])
class TestGolden:
    """Ten steps of 1000, with the authors' noise."""

    def test_an_analytic_model_follows_the_authors(self, name, sampler, clip):
        arrays, _ = load("samplers")
        schedule, noises = noise_schedule(name, 1000), arrays["noises"]
        ours = trajectory(
            analytic(schedule), schedule, arrays["z"], torch.zeros(2, dtype=torch.int64),
            sampler=sampler, num_steps=10, clip_denoised=clip, step_noise=noises.__getitem__,
        )  # fmt: skip
        assert_steps_close(ours, arrays[f"analytic_{name}_{sampler}_clip{clip:d}_traj"], 3e-5)

    def test_a_routed_model_follows_the_authors(self, name, sampler, clip, golden_dit):
        arrays, meta = load("samplers")
        noises, tolerance = arrays["noises"], 1e-3 if clip else 1e-4
        arguments = golden_dit(meta), noise_schedule(name, 1000), arrays["z"], torch.tensor(meta["y"])
        options = {
            "sampler": sampler,
            "num_steps": 10,
            "clip_denoised": clip,
            "step_noise": noises.__getitem__,
        }
        suffix = f"{name}_{sampler}_clip{clip:d}"
        assert_steps_close(trajectory(*arguments, **options), arrays[f"dit_{suffix}_traj"], tolerance)
        guided = sample(*arguments, **options, guidance_scale=1.5, null_label=meta["classes"])
        assert_steps_close(guided[None], arrays[f"ditcfg_{suffix}_final"][None], tolerance)


@pytest.mark.parametrize("num_steps", [1, 8, 10, 250, 1000])
def test_kept_timesteps_equal_the_authors(num_steps):
    expected = load("samplers")[0][f"timesteps_1000_{num_steps}"].tolist()
    assert sampling_timesteps(COSINE, "ddpm", num_steps) == expected[::-1]
    assert sampling_timesteps(COSINE, "ddim", num_steps) == expected[::-1]


@quick
@given(
    st.sampled_from(SAMPLERS), st.sampled_from(["cosine", "linear"]),
    st.integers(21, 400).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))),
)  # fmt: skip
def test_timesteps_fall_and_are_as_many_as_asked(sampler, name, size):
    num_timesteps, num_steps = size
    timesteps = sampling_timesteps(noise_schedule(name, num_timesteps), sampler, num_steps)
    assert len(timesteps) == num_steps
    assert 0 <= timesteps[-1] <= timesteps[0] < num_timesteps
    assert all(a > b for a, b in itertools.pairwise(timesteps))


@pytest.mark.parametrize("v", [-1.0, 0.3, None])
def test_ddpm_steps_as_diffusers_ddpm_scheduler(v):
    schedule, z = noise_schedule("linear", 100), latents(3, (2, 3, 4, 4))

    def model(x, t, y):
        noise = 0.9 * x
        return noise if v is None else torch.cat([noise, torch.full_like(x, v)], dim=1)

    scheduler = DDPMScheduler(
        num_train_timesteps=100, trained_betas=schedule.betas.tolist(), clip_sample=False,
        variance_type="fixed_small" if v is None else "learned_range",
    )  # fmt: skip
    theirs, generator, expected = z, torch.Generator().manual_seed(1), []
    for t in range(99, -1, -1):
        theirs = scheduler.step(model(theirs, t, None), t, theirs, generator=generator).prev_sample
        expected.append(theirs)
    generator = torch.Generator().manual_seed(1)
    ours = trajectory(
        model, schedule, z, torch.zeros(2).long(), sampler="ddpm", num_steps=100,
        step_noise=lambda i: torch.randn(z.shape, generator=generator),
    )  # fmt: skip
    assert_steps_close(ours, torch.stack(expected), 2e-4)


@pytest.mark.parametrize("num_steps", [5, 20])
def test_dpm_solver_steps_as_diffusers_scheduler(num_steps):
    schedule, z = noise_schedule("linear", 1000), latents(4, (2, 3, 4, 4))
    scheduler = DPMSolverMultistepScheduler(1000, trained_betas=schedule.betas.tolist())
    scheduler.set_timesteps(num_steps)
    assert sampling_timesteps(schedule, "dpm_solver++", num_steps) == scheduler.timesteps.tolist()
    model = analytic(schedule)
    theirs, expected = z, []
    for t in scheduler.timesteps:
        output = model(theirs, t.expand(2), None)[:, :3]
        theirs = scheduler.step(output, t, theirs).prev_sample
        expected.append(theirs)
    ours = trajectory(model, schedule, z, torch.zeros(2).long(), sampler="dpm_solver++", num_steps=num_steps)
    assert_steps_close(ours, torch.stack(expected), 2e-4)


def gaussian(schedule, std):
    """The best noise prediction for images that are normal with standard deviation `std`."""
    abar = schedule.alphas_cumprod
    scale = ((1 - abar).sqrt() / (abar * std**2 + 1 - abar)).float()
    return lambda x, t, y: scale[t].view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_dpm_solver_comes_closer_to_the_exact_flow_than_ddim(name):
    schedule, z, std = noise_schedule(name, 1000), latents(8, (4, 1, 8, 8)), 0.5
    model, labels = gaussian(schedule, std), torch.zeros(4).long()
    errors = {
        sampler: (sample(model, schedule, z, labels, sampler=sampler, num_steps=50) / z / std - 1).abs().max()
        for sampler in ("ddim", "dpm_solver++")
    }
    assert errors["dpm_solver++"] < 0.002
    assert errors["dpm_solver++"] < errors["ddim"] / 10


def test_ddpm_draws_the_variance_of_the_data():
    z, noises = latents(9, (512, 1, 2, 2)), latents(10, (50, 512, 1, 2, 2))
    x = sample(
        gaussian(COSINE, 0.3), COSINE, z, torch.zeros(512).long(), sampler="ddpm", num_steps=50,
        step_noise=noises.__getitem__,
    )  # fmt: skip
    assert 0.26 < x.std().item() < 0.31


@quick
@given(
    st.sampled_from(["ddim", "dpm_solver++"]), st.sampled_from(["cosine", "linear"]), st.integers(2, 60),
    st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_a_perfect_model_of_one_image_gives_it_back(sampler, name, num_steps, seed, clip):
    schedule, target = noise_schedule(name, 1000), latents(seed, (1, 1, 4, 4)).clamp(-1, 1)
    signal = schedule.alphas_cumprod.sqrt().float()
    noise_scale = (1 - schedule.alphas_cumprod).sqrt().float()

    def model(x, t, y):
        signals, scales = signal[t].view(-1, 1, 1, 1), noise_scale[t].view(-1, 1, 1, 1)
        return (x - signals * target) / scales

    z = latents(seed + 1, (2, 1, 4, 4))
    x = sample(
        model, schedule, z, torch.zeros(2).long(), sampler=sampler, num_steps=num_steps, clip_denoised=clip
    )
    torch.testing.assert_close(x, target.expand_as(x), rtol=0, atol=1e-2)


def mixing_free_model(x, t, y):
    """Differs by timestep and label, and treats each sample apart."""
    shift = (t / 1000 + y).view(-1, 1, 1, 1).float()
    return torch.cat([torch.tanh(x + shift), torch.sin(x)], dim=1)


@quick
@given(
    st.sampled_from(SAMPLERS),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([1.0, 2.0]),
)
def test_samples_do_not_depend_on_the_batch_split(sampler, sizes, guidance_scale):
    total = sum(sizes)
    labels = torch.arange(total) % 3

    def draw(indices):
        noise = SampleNoise(7, indices, (2, 3, 3), "cpu")
        return sample(
            mixing_free_model, COSINE, noise.initial(), labels[indices], sampler=sampler, num_steps=4,
            guidance_scale=guidance_scale, null_label=3, clip_denoised=True, step_noise=noise.step,
        )  # fmt: skip

    indices = torch.arange(total)
    parts = [draw(part.tolist()) for part in indices.split(sizes)]
    torch.testing.assert_close(torch.cat(parts), draw(indices.tolist()), rtol=0, atol=1e-6)


class TestSampleNoise:
    """Noise keyed by the sample's number."""

    def test_each_draw_is_fixed_by_seed_number_and_step(self):
        noise = SampleNoise(0, [5, 2], (1, 4, 4), "cpu")
        again = SampleNoise(0, [2], (1, 4, 4), "cpu")
        third = noise.step(3)
        assert torch.equal(third[1:], again.step(3))  # whatever was drawn before
        assert torch.equal(noise.initial()[1:], again.initial())
        draws = [noise.initial(), noise.step(0), third, SampleNoise(1, [5, 2], (1, 4, 4), "cpu").initial()]
        rows = torch.cat(draws).flatten(1)
        assert len(torch.unique(rows, dim=0)) == len(rows)

    def test_it_is_standard_normal(self):
        x = SampleNoise(3, range(500), (1, 8, 8), "cpu").initial()
        assert x.dtype == torch.float32
        assert abs(x.mean().item()) < 0.02
        assert abs(x.std().item() - 1) < 0.02

    def test_no_samples_are_an_empty_batch(self):
        assert SampleNoise(0, [], (3, 2, 2), "cpu").initial().shape == (0, 3, 2, 2)

    def test_it_leaves_the_global_generator_alone(self):
        state = torch.random.get_rng_state()
        noise = SampleNoise(0, [0], (1, 2, 2), "cpu")
        sample(
            mixing_free_model, COSINE, noise.initial(), torch.zeros(1).long(), sampler="ddpm", num_steps=3,
            step_noise=noise.step,
        )  # fmt: skip
        assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_model_gets_original_timesteps_labels_and_batch(sampler):
    seen = []

    def model(x, t, y):
        seen.append((x.shape, t.clone(), y.clone()))
        return torch.cat([x, x], dim=1)

    z = latents(1, (2, 1, 4, 4))
    labels = torch.tensor([4, 1])
    sample(model, COSINE, z, labels, sampler=sampler, num_steps=5, step_noise=lambda i: z)
    for (shape, t, y), expected in zip(seen, sampling_timesteps(COSINE, sampler, 5), strict=True):
        assert shape == z.shape
        assert t.dtype == torch.int64
        assert t.tolist() == [expected] * 2
        assert torch.equal(y, labels)
    assert seen[0][1][0] >= 990


def test_guidance_can_leave_channels_out():
    def model(x, t, y):
        return (y < 3).float().view(-1, 1, 1, 1).expand_as(x)

    z, labels = latents(2, (2, 4, 4, 4)), torch.zeros(2).long()
    options = {"sampler": "ddim", "num_steps": 1, "guidance_scale": 3.0, "null_label": 3}
    every = sample(model, COSINE, z, labels, **options)
    three = sample(model, COSINE, z, labels, guided_channels=3, **options)
    # The one step is at t = 0 and takes the predicted noise off: 0 + 3 * (1 - 0) where guided, 1 where not.
    abar = COSINE.alphas_cumprod[0].float()
    guided, unguided = ((z - noise * (1 - abar).sqrt()) / abar.sqrt() for noise in (3, 1))
    torch.testing.assert_close(every, guided, rtol=0, atol=1e-5)
    torch.testing.assert_close(three, torch.cat([guided[:, :3], unguided[:, 3:]], dim=1), rtol=0, atol=1e-5)


def test_guidance_leaves_the_variance_to_the_label():
    def model(x, t, y):
        variance = (y < 3).float().view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([torch.zeros_like(x), variance], dim=1)

    noises = latents(3, (3, 2, 4, 4, 4))
    options = {"sampler": "ddpm", "num_steps": 4, "step_noise": noises.__getitem__}
    arguments = model, COSINE, latents(2, (2, 4, 4, 4)), torch.zeros(2).long()
    assert torch.equal(
        sample(*arguments, **options, guidance_scale=4.0, null_label=3), sample(*arguments, **options)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipped_samples_end_inside_the_range_of_pixels(sampler):
    z = latents(5, (2, 1, 4, 4))
    x = sample(
        lambda x, t, y: -3 * x, COSINE, z, torch.zeros(2).long(), sampler=sampler, num_steps=6,
        clip_denoised=True, step_noise=lambda i: z,
    )  # fmt: skip
    assert x.abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_float32_ordinary_tensors_under_autocast(sampler):
    layer = torch.nn.Conv2d(1, 2, 1)
    z = latents(6, (2, 1, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        x = sample(
            lambda x, t, y: layer(x), COSINE, z, torch.zeros(2).long(), sampler=sampler, num_steps=3,
            clip_denoised=True, step_noise=lambda i: z,
        )  # fmt: skip
    assert x.dtype == torch.float32
    assert not x.is_inference()
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"num_steps": 0}, "num_steps is 0: it must be from 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001"),
        ({"guidance_scale": 1.5}, "needs null_label"),
        ({"sampler": "ddpm"}, "needs step_noise"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, message):
    z = latents(1, (1, 1, 2, 2))
    with pytest.raises(ValueError, match=message):
        sample(
            lambda x, t, y: x,
            COSINE,
            z,
            torch.zeros(1).long(),
            **{"sampler": "ddim", "num_steps": 5, **options},
        )
