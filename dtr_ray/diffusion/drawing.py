"""Drawing samples by their number: what evaluation, grids and the exported pipeline have in common."""

import torch
from torch import Tensor

from dtr_ray.config import SamplingConfig
from dtr_ray.diffusion.noise import NoiseSchedule
from dtr_ray.diffusion.samplers import Model, SampleNoise, sample


def draw(
    model: Model,
    schedule: NoiseSchedule,
    sampling: SamplingConfig,
    sample_shape: tuple[int, int, int],
    *,
    seed: int,
    indices: Tensor,
    labels: Tensor,
    device: torch.device,
    bf16: bool = False,
) -> Tensor:
    """The samples of the given numbers: each depends on (seed, its number, its label or caption) alone.

    Args:
        model: as for `sample`; its `null_tokens` or `null_label`, where it has one, is what guidance leans
            against.
        schedule: the one that the model was trained with.
        sampling: sampler, steps and guidance.
        sample_shape: (C, H, W) of what the model sees.
        seed: of the noise, 0 or above.
        indices: int64 (B,), numbers of the samples, 0 or above.
        labels: int64 (B,), or text tokens, float (B, L, D).
        device: where the model is.
        bf16: run the model under bfloat16 autocast.

    Returns:
        float32 (B, C, H, W): pixels in about [-1, 1], or scaled latents.

    Raises:
        ValueError: as `sample`.
    """
    null_tokens = getattr(model, "null_tokens", None)
    noise = SampleNoise(seed, indices.tolist(), sample_shape, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return sample(
            model,
            schedule,
            noise.initial(),
            labels.to(device) if labels.dtype == torch.int64 else labels.to(device).float(),
            sampler=sampling.sampler,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            null_label=getattr(model, "null_label", None) if null_tokens is None else null_tokens,
            guided_channels=3 if sampling.guidance_channels == "first_three" else None,
            clip_denoised=sampling.clip_denoised,
            step_noise=noise.step,
        )
