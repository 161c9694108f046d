"""DTRPipeline: a trained model as a diffusers pipeline, drawing the samples that evaluation draws.

diffusers runs no code because a model's folder names it. So the folder holds `pipeline.py`, three lines that
import this module, and `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it; so
does `DTRPipeline.from_pretrained(folder)`, which runs nothing from the folder.
"""

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from dtr_ray.config import SamplingConfig
from dtr_ray.data.dataset import quantise
from dtr_ray.data.latents import decode_latents
from dtr_ray.data.text import TextEncoder
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.evaluation.blocks import BLOCK_IMAGES
from dtr_ray.evaluation.evaluate import sample_labels
from dtr_ray.export.model import DTRModel

SCHEDULERS: dict[Literal["ddpm", "ddim", "dpm_solver++"], Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm_solver++": DPMSolverMultistepScheduler,
}
"""Which of diffusers' schedulers stands for which sampler."""

_LOADER = '''\
"""Lets diffusers find the pipeline, whose code is in the package dtr_ray: it must be installed."""

from dtr_ray.export.pipeline import DTRPipeline  # noqa: F401
'''


class DTRPipeline(DiffusionPipeline):
    """Images from a DTR model; sample i depends on (seed, i, its label or caption) alone."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: DTRModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        # Any: of the library transformers, which only models with captions need.
        text_encoder: Any = None,
        tokenizer: Any = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_channels: str = "all",
        clip_denoised: bool = False,
        precision: str = "fp32",
        seed: int = 0,
        latent_scale: float = 0.18215,
        gray: bool = False,
        prompts: list[str] | None = None,
    ) -> None:
        """The components, and what a call uses where it is not told otherwise.

        Args:
            transformer: the model.
            scheduler: one of `SCHEDULERS`: stands for the sampler; its config names the noise schedule.
            vae: decodes the samples, where the model draws latents.
            text_encoder: a `CLIPTextModel`, where captions condition the model.
            tokenizer: its `CLIPTokenizer`.
            num_inference_steps: steps of the sampler.
            guidance_scale: classifier-free guidance; 1 is none.
            guidance_channels: `all`, or `first_three` (as the official DiT sampling).
            clip_denoised: clip the predicted image to [-1, 1].
            precision: `fp32`, or `bf16` for autocast.
            seed: of the noise.
            latent_scale: factor from raw to scaled latents.
            gray: average the VAE's channels to one.
            prompts: captions of the evaluation's first samples, for calls without a prompt.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            clip_denoised=clip_denoised,
            precision=precision,
            seed=seed,
            latent_scale=latent_scale,
            gray=gray,
            prompts=prompts or [],
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor | int | None = None,
        num_images: int | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_index: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        batch_size: int = BLOCK_IMAGES,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws images; with nothing but `num_images`, the first ones that the evaluation drew.

        Args:
            class_labels: the label of each image, or one for all; default: the classes in turn.
            num_images: default: as many as labels or prompts, else 1.
            prompt: the caption of each image, or one for all; "" is none; default: `prompts` in turn.
            seed: of the noise; default: the evaluation's.
            generator: draws the seed, in place of `seed`.
            first_index: number of the first sample.
            guidance_scale: 1 is none; default: the trained configuration's, as for the steps.
            num_inference_steps: in [1, T].
            batch_size: images at once; another than evaluation's changes images by rounding, if at all.
            output_type: `pil`; `np`, float (n, H, W, C); or `pt`, float (n, C, H, W); both in [0, 1].
            return_dict: an object with `images`, or a tuple.

        Raises:
            ValueError: labels out of range, labels where the model takes captions or the other way round,
                guidance where it has learnt nothing without them, or another value out of range.
        """
        if batch_size < 1 or first_index < 0 or (num_images is not None and num_images < 1):
            raise ValueError(
                f"num_images {num_images} and batch_size {batch_size} must be at least 1, "
                f"and first_index {first_index} at least 0"
            )
        choose = self._labels if self.text_encoder is None else self._prompts
        conditions = choose(class_labels, prompt, num_images, first_index)
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        seed = self.config.seed if seed is None else seed
        sampling = self._sampling(guidance_scale, num_inference_steps)
        starts = range(0, len(conditions), batch_size)
        parts = [(first_index + start, conditions[start : start + batch_size]) for start in starts]
        pixels = torch.cat([self._draw(sampling, seed, *part).cpu() for part in self.progress_bar(parts)])
        self.maybe_free_model_hooks()
        images = _as_output(pixels, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draw(
        self, sampling: SamplingConfig, seed: int, first: int, conditions: Tensor | list[str]
    ) -> Tensor:
        """uint8 pixels (B, C, H, W) of the samples from `first` on, by their labels or captions."""
        model = self.transformer
        if not isinstance(conditions, Tensor):
            conditions = TextEncoder(self.text_encoder, self.tokenizer).encode(conditions)
        x = draw(
            model,
            noise_schedule(self.scheduler.config.beta_schedule, self.scheduler.config.num_train_timesteps),
            sampling,
            (model.in_channels, model.input_size, model.input_size),
            seed=seed,
            indices=torch.arange(first, first + len(conditions)),
            labels=conditions,
            device=self._execution_device,
            bf16=self.config.precision == "bf16",
        )
        if self.vae is None:
            return quantise(x)
        return decode_latents(self.vae, x, self.config.latent_scale, gray=self.config.gray)

    def _prompts(
        self, labels: Any, given: str | Sequence[str] | None, count: int | None, first: int
    ) -> list[str]:
        if labels is not None:
            raise ValueError("class_labels are for models of classes: this one takes a prompt")
        if given is None:
            known = self.config.prompts
            if not known:
                raise ValueError("prompt is missing: the pipeline knows none of its own")
            return [known[i % len(known)] for i in range(first, first + (1 if count is None else count))]
        prompts = [given] if isinstance(given, str) else list(given)
        if len(prompts) == 1 and count is not None:
            prompts *= count
        if not prompts or count not in (None, len(prompts)):
            raise ValueError(f"num_images is {count}, but there are {len(prompts)} prompts")
        return prompts

    def _labels(
        self, given: list[int] | Tensor | int | None, prompt: Any, count: int | None, first: int
    ) -> Tensor:
        if prompt is not None:
            raise ValueError("prompt is for models of captions: this one takes class_labels")
        classes = self.transformer.num_classes
        if given is None:
            return sample_labels(torch.arange(first, first + (1 if count is None else count)), classes)
        labels = torch.as_tensor(given, dtype=torch.int64).cpu().reshape(-1)
        if len(labels) == 1 and count is not None:
            labels = labels.expand(count)
        if count not in (None, len(labels)):
            raise ValueError(f"num_images is {count}, but there are {len(labels)} class_labels")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"class label {int(wrong[0])} is not in [0, {classes})")
        return labels

    def _sampling(self, guidance_scale: float | None, num_steps: int | None) -> SamplingConfig:
        found = [name for name, kind in SCHEDULERS.items() if type(self.scheduler) is kind]
        if not found:
            names = ", ".join(kind.__name__ for kind in SCHEDULERS.values())
            raise ValueError(f"the scheduler is a {type(self.scheduler).__name__}: it must be one of {names}")
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}: it must be at least 1")
        guidance = float(self.config.guidance_scale if guidance_scale is None else guidance_scale)
        if not 1 <= guidance < math.inf:
            raise ValueError(f"guidance_scale is {guidance:g}: it must be at least 1, which is none")
        return SamplingConfig(
            sampler=found[0],
            num_steps=steps,
            guidance_scale=guidance,
            guidance_channels=self.config.guidance_channels,
            clip_denoised=self.config.clip_denoised,
        )

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Writes the folder that `from_pretrained` reads; arguments as those of diffusers."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        index = folder / self.config_name
        content = json.loads(index.read_text(encoding="utf-8"))
        content["_class_name"] = ["pipeline", type(self).__name__]
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "pipeline.py").write_text(_LOADER, encoding="utf-8")

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own, but the class is this one, and no code of the folder is needed."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict):
            config["_class_name"] = cls.__name__
        return config


def _as_output(pixels: Tensor, output_type: str) -> Any:
    """uint8 (n, C, H, W) as what the caller asked for."""
    if output_type == "pt":
        return pixels.float() / 255
    rows = pixels.permute(0, 2, 3, 1)
    if output_type == "np":
        return (rows.float() / 255).numpy()
    if output_type == "pil":
        return [Image.fromarray(row.squeeze(-1).contiguous().numpy()) for row in rows]
    raise ValueError(f"output_type is {output_type!r}: it must be pil, np or pt")
