"""Rules between the sections of a trial: what the classes of the single sections cannot see."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtr_ray.config.errors import Problem, broken, shown

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
    yield from _proxy_problems(trial)
    clusters, batch_size = getattr(trial.weighting, "num_clusters", 1), trial.training.batch_size
    if trial.training.accumulation_steps > batch_size:
        rule = f"{trial.training.accumulation_steps} is more than training.batch_size {batch_size}"
        yield _problem("training.accumulation_steps", rule, "training.batch_size")
    if clusters > timesteps:
        rule = f"{clusters} is more than diffusion.num_timesteps {timesteps}"
        yield _problem("weighting.num_clusters", rule, "diffusion.num_timesteps")


def _model_problems(trial: "TrialConfig") -> Iterator[Problem]:
    model, resolved = trial.model, trial.resolved_model
    for key in ("input_size", "in_channels", "num_classes", "text_channels"):
        given, right = getattr(model, key), getattr(resolved, key)
        if given is not None and given != right:
            yield _problem(f"model.{key}", f"is {given}, but the data gives {shown(right)}: leave it out")
    yield from _unet_problems(trial) if model.family == "ADM" else _transformer_problems(trial)
    yield from _combination_problems(trial)


def _transformer_problems(trial: "TrialConfig") -> Iterator[Problem]:
    model, size = trial.model, trial.resolved_model.input_size
    assert size is not None
    patch, hidden, heads = (model.value(key) for key in ("patch_size", "hidden_size", "num_heads"))
    if size % patch:
        rule = f"patch size {patch} does not divide the model's input size {size}"
        key = "model.patch_size" if model.patch_size else "model.name"
        yield _problem(key, rule, "data.resolution")
    width_key = "model.hidden_size" if model.hidden_size else "model.num_heads"
    if hidden % heads:
        rule = f"hidden size {hidden} is not a multiple of num_heads {heads}"
        yield _problem(width_key, rule, "model.num_heads")
    if hidden % 4:
        # Sine and cosine, for height and width.
        yield _problem(width_key, f"hidden size {hidden} is not a multiple of 4, which positions need")
    yield from _width_problems(trial, hidden)
    experts = model.value("num_experts")
    if model.family == "Multi-DiT" and experts > trial.diffusion.num_timesteps:
        rule = f"{experts} is more than diffusion.num_timesteps {trial.diffusion.num_timesteps}"
        yield _problem("model.num_experts", rule, "diffusion.num_timesteps")


def _unet_problems(trial: "TrialConfig") -> Iterator[Problem]:
    model, size = trial.model, trial.resolved_model.input_size
    assert size is not None
    hidden, multipliers = model.value("hidden_size"), model.value("channel_multipliers")
    halvings = len(multipliers) - 1
    key = "model.channel_multipliers" if model.channel_multipliers else "model.name"
    if size % 2**halvings:
        rule = f"{halvings} halvings do not divide the model's input size {size}"
        yield _problem(key, rule, "data.resolution")
    if hidden % 32:
        # Group norms of 32 groups.
        yield _problem("model.hidden_size", f"{hidden} is not a multiple of 32, which the group norms need")
    heads, attended = model.value("num_head_channels"), model.value("attention_resolutions")
    sizes = {size >> level: hidden * factor for level, factor in enumerate(multipliers)}
    for wrong in [r for r in attended if r not in sizes] if model.attention_resolutions else []:
        rule = f"{wrong} is not a height that the model has: {', '.join(map(str, sizes))}"
        yield _problem("model.attention_resolutions", rule, "data.resolution")
    for width in [w for r, w in sizes.items() if (r in attended or r == min(sizes)) and w % heads]:
        rule = f"{heads} channels a head do not divide the {width} channels of an attention block"
        key = "model.num_head_channels" if model.num_head_channels else "model.name"
        yield _problem(key, rule, "model.hidden_size", "model.channel_multipliers")
        break
    yield from _width_problems(trial, hidden)


def _width_problems(trial: "TrialConfig", width: int) -> Iterator[Problem]:
    """Whether the routing leaves a channel on and, of the explicit clusters, one for each."""
    routing = trial.routing
    for key in ("beta", "last_beta"):
        beta = getattr(routing, key, 1.0)
        if int(beta * width) < 1:
            rule = f"{shown(beta)} of {width} channels is none: at least one must be on"
            yield _problem(f"routing.{key}", rule, "model.hidden_size")
    clusters = getattr(routing, "num_clusters", 1)
    if clusters > trial.diffusion.num_timesteps:
        rule = f"{clusters} is more than diffusion.num_timesteps {trial.diffusion.num_timesteps}"
        yield _problem("routing.num_clusters", rule, "diffusion.num_timesteps")
    if routing.name == "explicit_clustered" and width - int(routing.shared * width) < clusters:
        own = width - int(routing.shared * width)
        rule = f"{clusters} intervals cannot divide the {own} channels that are not shared"
        yield _problem("routing.num_clusters", rule, "routing.shared", "model.hidden_size")


def _combination_problems(trial: "TrialConfig") -> Iterator[Problem]:
    model, routing = trial.model, trial.routing
    if model.family == "Switch-DiT" and routing.name != "none":
        rule = f"{routing.name} does not go with {model.name}, which routes by its experts: write name: none"
        yield _problem("routing.name", rule, "model.name")
    if trial.data.text_encoder is not None and model.family != "DiT":
        rule = f"captions go with a DiT, not with {model.name}"
        yield _problem("data.text_encoder", rule, "model.name")
    if routing.name == "scheduled" and routing.over == "blocks" and model.family == "ADM":
        yield _problem("routing.over", "blocks is for transformers: an ADM's differ in width", "model.name")


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
    if not trial.data.is_conditional:
        rule = f"{guidance} classes; the data is unconditional (data.num_classes 1)"
        yield _problem("sampling.guidance_scale", rule, "data.num_classes")
    elif trial.model.class_dropout_prob == 0:
        rule = f"{guidance} model.class_dropout_prob above 0: the model must learn to draw without a class"
        yield _problem("sampling.guidance_scale", rule, "model.class_dropout_prob")


def _proxy_problems(trial: "TrialConfig") -> Iterator[Problem]:
    evaluation, proxy = trial.evaluation, trial.evaluation.proxy
    if proxy is None:
        return
    if proxy.until_step >= trial.training.num_steps:
        steps = trial.training.num_steps
        rule = f"{proxy.until_step} is not below training.num_steps {steps}: no full distance would follow"
        yield _problem("evaluation.proxy.until_step", rule, "training.num_steps")
    if proxy.num_samples is not None and proxy.num_samples > evaluation.num_samples:
        rule = f"{proxy.num_samples} is more than evaluation.num_samples {evaluation.num_samples}: no cheaper"
        yield _problem("evaluation.proxy.num_samples", rule, "evaluation.num_samples")
    if proxy.num_steps is not None and proxy.num_steps > trial.diffusion.num_timesteps:
        rule = f"{proxy.num_steps} is more than diffusion.num_timesteps {trial.diffusion.num_timesteps}"
        yield _problem("evaluation.proxy.num_steps", rule, "diffusion.num_timesteps")


def _problem(key: str, rule: str, *also: str) -> Problem:
    return broken(key, rule, *also).problems[0]
