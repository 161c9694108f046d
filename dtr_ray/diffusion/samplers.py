"""Samplers: images from noise, stepped by diffusers' schedulers. B batch, C channels, T timesteps.

The model always gets the original timestep in [0, T), whatever the number of steps. Schedulers get the
predicted image, not the noise: then one clipping rule serves all, and none has to know of the variance.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from dtr_ray.diffusion.noise import NoiseSchedule
from dtr_ray.randomness import keyed_generator

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]
# (executed step, predicted image, x_t, variance's interpolation or None) -> x of the next step.
Step = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]

_SAMPLE_STREAM = 100
"""Apart from every stream of random numbers used in training."""
_LOWEST_LOG_SNR = -5.1
"""Half of log SNR under which DPM-Solver++ does not start: there the predicted image is noise times 100s."""


class SampleNoise:
    """Noise of samples by their number, each from generators of its own.

    So neither the batch size nor the number of workers changes any sample's noise.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], sample_shape: tuple[int, ...], device: torch.device | str
    ) -> None:
        """For the samples `indices` (B of them, 0 or above), of shape (C, H, W), to be put on `device`."""
        self._seed = seed
        self._indices = list(indices)
        self._shape = sample_shape
        self._device = torch.device(device)

    def initial(self) -> Tensor:
        """x_T, float32 (B, C, H, W)."""
        return self._draw(0)

    def step(self, i: int) -> Tensor:
        """Noise of executed step i (0 is the noisiest), float32 (B, C, H, W)."""
        return self._draw(i + 1)

    def _draw(self, number: int) -> Tensor:
        # On the CPU, so that every device gets the same numbers.
        noise = torch.empty(len(self._indices), *self._shape)
        for row, index in zip(noise, self._indices, strict=True):
            generator = keyed_generator(self._seed, _SAMPLE_STREAM, index, number)
            torch.randn(self._shape, generator=generator, out=row)
        if self._device.type == "cuda":
            return noise.pin_memory().to(self._device, non_blocking=True)
        return noise.to(self._device)


def sampling_timesteps(schedule: NoiseSchedule, sampler: str, num_steps: int) -> list[int]:
    """The original timesteps that a sampler visits, noisiest first: `num_steps` distinct ones.

    `ddpm` and `ddim`: evenly from T - 1 to 0, both included (Improved DDPM, section 4); a single step is 0.
    `dpm_solver++`: evenly down towards 0, which is left out, from the last timestep of log SNR / 2 >= -5.1;
    where that leaves too few, as the others.

    Raises:
        ValueError: an unknown sampler, or `num_steps` not in [1, T].
    """
    if sampler not in STEPPERS:
        raise ValueError(f"unknown sampler {sampler!r}: one of {', '.join(STEPPERS)}")
    if not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(f"num_steps is {num_steps}: it must be from 1 to {schedule.num_timesteps} timesteps")
    if sampler == "dpm_solver++":
        first = int((schedule.snr.log() / 2 >= _LOWEST_LOG_SNR).sum()) - 1
        if num_steps <= first:
            return [round(i * first / num_steps) for i in range(num_steps, 0, -1)]
    stride = (schedule.num_timesteps - 1) / max(num_steps - 1, 1)
    # Added up, not multiplied: halves then round as in the published samplers.
    return [round(place) for place in accumulate(repeat(stride, num_steps - 1), initial=0.0)][::-1]


def sample(
    model: Model,
    schedule: NoiseSchedule,
    x_init: Tensor,
    labels: Tensor,
    *,
    sampler: str,
    num_steps: int,
    guidance_scale: float = 1.0,
    null_label: int | Tensor | None = None,
    guided_channels: int | None = None,
    clip_denoised: bool = False,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Samples by stepping from noise to images; no sample depends on the others of its batch.

    Args:
        model: `model(x, t, y)` gives the noise (B, C, H, W), or (B, 2 C, H, W) with the variance's
            interpolation in the second half; t is the original timestep, (B,) int64.
        schedule: the one that the model was trained with.
        x_init: standard normal (B, C, H, W); the samples are computed on its device.
        labels: (B,) int64; or text tokens, float (B, L, D).
        sampler: `ddpm` (Ho et al.), `ddim` (Song et al., eta 0), `dpm_solver++` (Lu et al., second
            order, multistep).
        num_steps: in [1, T].
        guidance_scale: classifier-free guidance (Ho & Salimans); 1 is none, and runs no second half.
        null_label: the label of no class, or the tokens (L, D) of no caption; needed for guidance.
        guided_channels: guide this many of the noise's channels (3 is the DiT authors' way); None: all.
            The variance's are never guided.
        clip_denoised: clip the predicted image to [-1, 1]: for pixels.
        step_noise: gives the noise (B, C, H, W) of executed step i, 0 the noisiest; needed for `ddpm`.

    Returns:
        float32 (B, C, H, W).

    Raises:
        ValueError: an unknown sampler, `num_steps` out of range, `null_label` or `step_noise` missing,
            null tokens of another shape than the captions'.
    """
    timesteps = sampling_timesteps(schedule, sampler, num_steps)
    if guidance_scale != 1 and null_label is None:
        raise ValueError(f"guidance_scale is {guidance_scale}: it needs null_label, the label of no class")
    if sampler == "ddpm" and step_noise is None:
        raise ValueError("sampler is 'ddpm': it needs step_noise, the noise of each step")
    abars = schedule.alphas_cumprod[timesteps].tolist()
    # Not seen by autograd, nor by the caller as an inference tensor, which could not be changed in place.
    with torch.inference_mode():
        step = STEPPERS[sampler](schedule, timesteps, step_noise)
        predict = _predictor(model, labels, x_init.shape[1], guidance_scale, null_label, guided_channels)
        x = x_init.float()
        for i, (t, abar) in enumerate(zip(timesteps, abars, strict=True)):
            noise, variance = predict(x, t)
            image = (x - math.sqrt(1 - abar) * noise) / math.sqrt(abar)
            if clip_denoised:
                image = image.clamp(-1, 1)
            x = step(i, image, x, variance)
    return x.clone()


def _predictor(
    model: Model,
    labels: Tensor,
    channels: int,
    guidance_scale: float,
    null_label: int | Tensor | None,
    guided_channels: int | None,
) -> Callable[[Tensor, int], tuple[Tensor, Tensor | None]]:
    """(x, t) -> noise (B, C, H, W), guided, and the variance's interpolation (unguided) or None; float32."""
    doubled = guidance_scale != 1
    if doubled:
        assert null_label is not None
        labels = torch.cat([labels, _null_like(labels, null_label)])

    def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        # One value expanded: models that route by t see without asking the device that all have the same.
        times = torch.full((1,), t, dtype=torch.int64, device=x.device).expand(len(labels))
        output = model(torch.cat([x, x]) if doubled else x, times, labels).float()
        if doubled:
            output = guide(output, channels if guided_channels is None else guided_channels, guidance_scale)
        return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None

    return predict


def guide(output: Tensor, guided_channels: int, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, eq. 6): null + scale * (conditioned - null).

    Args:
        output: a model's, (2 B, C, H, W): the first half with its conditions, the second with none.
        guided_channels: the first so many are guided; the others are the first half's own.
        scale: 1 is no guidance.

    Returns:
        (B, C, H, W).
    """
    own, null = output.chunk(2)
    guided = null[:, :guided_channels].lerp(own[:, :guided_channels], scale)
    return torch.cat([guided, own[:, guided_channels:]], dim=1)


def _null_like(labels: Tensor, null_label: int | Tensor) -> Tensor:
    """The null condition for each of B samples, as their own: int64 (B,), or float (B, L, D)."""
    if not isinstance(null_label, Tensor):
        return torch.full_like(labels, null_label)
    if null_label.shape != labels.shape[1:]:
        raise ValueError(
            f"no caption has tokens {tuple(null_label.shape)}, the captions {tuple(labels.shape[1:])}: "
            "they must be of one shape"
        )
    return null_label.to(labels).expand_as(labels)


def _ddim_scheduler(schedule: NoiseSchedule, timesteps: list[int]) -> Any:
    """A scheduler of the kept timesteps alone, counted from 0: so its step before is the kept one before."""
    # Imported here and below: diffusers takes seconds, which no sweep's driver and no first step waits for.
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    abar = schedule.alphas_cumprod[timesteps[::-1]]
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=len(timesteps),
        trained_betas=betas.tolist(),
        prediction_type="sample",
        clip_sample=False,
    )
    # The scheduler multiplies up float32 betas, and 1 - beta has no correct digit left where beta is near 1.
    scheduler.alphas_cumprod = abar
    scheduler.set_timesteps(len(timesteps))
    return scheduler


def _ddim(schedule: NoiseSchedule, timesteps: list[int], step_noise: StepNoise | None) -> Step:
    """DDIM with eta 0 (Song et al., eq. 12)."""
    scheduler, last = _ddim_scheduler(schedule, timesteps), len(timesteps) - 1

    def step(i: int, image: Tensor, x: Tensor, variance: Tensor | None) -> Tensor:
        following: Tensor = scheduler.step(image, last - i, x, return_dict=False)[0]
        return following

    return step


def _ddpm(schedule: NoiseSchedule, timesteps: list[int], step_noise: StepNoise | None) -> Step:
    """DDPM, its variance the posterior's or learned in the range up to beta (Improved DDPM, eq. 15).

    It is DDIM with eta 1 (Song et al., section 4.1); diffusers' DDPMScheduler would draw the noise itself,
    from one generator for the whole batch. A learned variance is then a factor of the noise.
    """
    assert step_noise is not None
    scheduler, last = _ddim_scheduler(schedule, timesteps), len(timesteps) - 1
    sigma2 = 1 - schedule.alphas_cumprod[timesteps]
    # beta over the posterior variance, in logs (DDPM, eq. 7).
    log_ranges = (sigma2[:-1] / sigma2[1:]).log().tolist()

    def step(i: int, image: Tensor, x: Tensor, variance: Tensor | None) -> Tensor:
        following: Tensor
        if i == last:  # the last step adds no noise
            following = scheduler.step(image, 0, x, return_dict=False)[0]
            return following
        noise = step_noise(i)
        if variance is not None:
            noise = noise * torch.exp((variance + 1) * (log_ranges[i] / 4))
        following = scheduler.step(image, last - i, x, eta=1.0, variance_noise=noise, return_dict=False)[0]
        return following

    return step


def _dpm_solver(schedule: NoiseSchedule, timesteps: list[int], step_noise: StepNoise | None) -> Step:
    """DPM-Solver++(2M) (Lu et al., algorithm 2)."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # in float64, as above
    scheduler.set_timesteps(timesteps=timesteps)
    scheduler.set_begin_index(0)  # or it would search for the first timestep on the device

    def step(i: int, image: Tensor, x: Tensor, variance: Tensor | None) -> Tensor:
        following: Tensor = scheduler.step(image, timesteps[i], x, return_dict=False)[0]
        return following

    return step


STEPPERS: dict[str, Callable[[NoiseSchedule, list[int], StepNoise | None], Step]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpm_solver++": _dpm_solver,
}
SAMPLERS = tuple(STEPPERS)
"""Names of the samplers."""
