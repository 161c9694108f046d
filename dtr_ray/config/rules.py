"""Rules between the sections of a trial: what the classes of the single sections cannot see."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtr_ray.config.errors import Problem, broken, shown
from dtr_ray.config.presets import PRESETS

if TYPE_CHECKING:
    from dtr_ray.config.trial import TrialConfig


def trial_problems(trial: "TrialConfig") -> Iterator[Problem]:
    """What is wrong with a trial whose sections are right one by one."""
    yield from _model_problems(trial)
    yield from _sampling_problems(trial)
    timesteps = trial.diffusion.num_timesteps
    if trial.diffusion.schedule == "linear" and timesteps <= 20:
        # Its betas are scaled by 1000 / T and would reach 1.
        rule = f"the linear schedule needs more than 20, got {timesteps}"
        yield _problem("diffusion.num_timesteps", rule, "diffusion.schedule")
    if trial.evaluation.every_steps > trial.training.num_steps:
        yield _problem(
            "evaluation.every_steps",
            f"{trial.evaluation.every_steps} is more than training.num_steps {trial.training.num_steps}: "
            "the trial would never be evaluated",
            "training.num_steps",
        )
    clusters = getattr(trial.weighting, "num_clusters", 1)
    if clusters > timesteps:
        rule = f"{clusters} is more than diffusion.num_timesteps {timesteps}"
        yield _problem("weighting.num_clusters", rule, "diffusion.num_timesteps")


def _model_problems(trial: "TrialConfig") -> Iterator[Problem]:
    model, resolved = trial.model, trial.resolved_model
    size, patch = resolved.input_size, trial.patch_size
    assert size is not None
    if size % patch:
        rule = f"patch size {patch} does not divide the model's input size {size}"
        key = "model.patch_size" if model.patch_size else "model.name"
        yield _problem(key, rule, "data.resolution")
    for key in ("input_size", "in_channels", "num_classes"):
        given, right = getattr(model, key), getattr(resolved, key)
        if given is not None and given != right:
            yield _problem(f"model.{key}", f"is {given}, but the data gives {right}: leave it out")
    preset = PRESETS.get(model.name)
    hidden = model.hidden_size or (preset.hidden_size if preset else 0)
    heads = model.num_heads or (preset.num_heads if preset else 1)
    width_key = "model.hidden_size" if model.hidden_size else "model.num_heads"
    if hidden % heads:
        rule = f"hidden size {hidden} is not a multiple of num_heads {heads}"
        yield _problem(width_key, rule, "model.num_heads")
    if hidden % 4:
        # Sine and cosine, for height and width.
        yield _problem(width_key, f"hidden size {hidden} is not a multiple of 4, which positions need")
    beta = getattr(trial.routing, "beta", 1.0)
    if int(beta * hidden) < 1:
        rule = f"{shown(beta)} of {hidden} channels is none: at least one must be on"
        yield _problem("routing.beta", rule, "model.hidden_size")


def _sampling_problems(trial: "TrialConfig") -> Iterator[Problem]:
    sampling = trial.sampling
    if sampling.num_steps > trial.diffusion.num_timesteps:
        rule = f"{sampling.num_steps} is more than diffusion.num_timesteps {trial.diffusion.num_timesteps}"
        yield _problem("sampling.num_steps", rule, "diffusion.num_timesteps")
    if sampling.clip_denoised and trial.data.vae is not None:
        rule = "is for pixels: latents are not bounded to [-1, 1]"
        yield _problem("sampling.clip_denoised", rule, "data.vae")
    if sampling.guidance_scale <= 1:
        return
    guidance = f"{shown(sampling.guidance_scale)} is guidance, which needs"
    if trial.data.classes == 1:
        rule = f"{guidance} classes; the data is unconditional (data.num_classes 1)"
        yield _problem("sampling.guidance_scale", rule, "data.num_classes")
    elif trial.model.class_dropout_prob == 0:
        rule = f"{guidance} model.class_dropout_prob above 0: the model must learn to draw without a class"
        yield _problem("sampling.guidance_scale", rule, "model.class_dropout_prob")


def _problem(key: str, rule: str, *also: str) -> Problem:
    return broken(key, rule, *also).problems[0]
