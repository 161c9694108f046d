"""Settings that have no effect: allowed, and told."""

from collections.abc import Iterator

from dtr_ray.config.base import Config
from dtr_ray.config.errors import shown
from dtr_ray.config.space import Choice, target
from dtr_ray.config.sweep import ASHAStopping, MedianStopping, SweepConfig
from dtr_ray.config.trial import TrialConfig


def trial_warnings(trial: TrialConfig) -> list[str]:
    """One sentence for each setting of a trial that has no effect."""
    return [f"{key} {reason}" for key, reason in _ignored_in_trial(trial)]


def config_warnings(sweep: SweepConfig) -> list[str]:
    """One sentence for each setting of a sweep, its trial included, that has no effect."""
    in_trial = [(f"trial.{key}", reason) for key, reason in _ignored_in_trial(sweep.trial)]
    return [f"{key} {reason}" for key, reason in (*in_trial, *_ignored_in_search(sweep), *_replaced(sweep))]


def _ignored_in_trial(trial: TrialConfig) -> Iterator[tuple[str, str]]:
    data, model, evaluation = trial.data, trial.model, trial.evaluation
    if evaluation.feature_weights is not None and evaluation.features != "inception":
        yield "evaluation.feature_weights", f"is ignored: {evaluation.features} brings its own weights"
    if data.vae is None and _set(data, "latent_scale"):
        yield "data.latent_scale", "is ignored: without data.vae the model sees pixels"
    if data.text_encoder is None and _set(data, "text_channels"):
        yield "data.text_channels", "is ignored: without data.text_encoder there are no captions"
    if trial.sampling.guidance_channels == "first_three" and data.sample_shape[0] <= 3:
        yield "sampling.guidance_channels", f"is ignored: of {data.sample_shape[0]} channels these are all"
    if trial.training.ema_warmup and trial.training.ema_decay == 0:
        yield "training.ema_warmup", "is ignored: training.ema_decay is 0"
    if not data.is_conditional and _set(model, "class_dropout_prob"):
        yield "model.class_dropout_prob", "is ignored: the data is unconditional"
    if trial.resolved_model.learn_sigma != model.learn_sigma and "learn_sigma" in model.model_fields_set:
        yield "model.learn_sigma", f"is ignored: diffusion.variance {trial.diffusion.variance} decides it"
    yield from _ignored_in_routing(trial)


def _ignored_in_routing(trial: TrialConfig) -> Iterator[tuple[str, str]]:
    routing, steps = trial.routing, trial.training.num_steps
    if routing.name == "scheduled" and routing.over == "blocks":
        for key in ("last_step", "every_steps"):
            if _set(routing, key):
                yield f"routing.{key}", "is ignored: routing.over is blocks, not training"
    elif routing.name in ("max_roaming", "scheduled") and steps <= min(
        routing.every_steps, getattr(routing, "last_step", steps)
    ):
        yield "routing.every_steps", f"is {routing.every_steps}: in {steps} steps the masks never change"


def _ignored_in_search(sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    search, stopping, resources = sweep.search, sweep.early_stopping, sweep.resources
    if search.sampler != "tpe" and _set(search, "num_startup_trials"):
        yield "search.num_startup_trials", f"is ignored: sampler {search.sampler} has no model to start"
    if search.sampler == "tpe" and search.num_startup_trials >= search.num_trials:
        yield "search.sampler", f"tpe is never used: the {search.num_trials} trials are all startup trials"
    if len(search.points) > search.num_trials:
        given = len(search.points)
        yield "search.starting_points", f"are {given}, but only {search.num_trials} trials are run"
    if resources.gpus_per_worker % 1 and resources.max_concurrent == 1:
        yield "resources.gpus_per_worker", "shares a GPU, but max_concurrent is 1: nothing shares it"
    if stopping.name != "none":
        training, every = sweep.trial.training, sweep.trial.evaluation.every_steps
        if stopping.grace_steps >= training.num_steps:
            yield "early_stopping", f"is ignored: grace_steps {stopping.grace_steps} is a trial's last step"
        elif stopping.grace_steps % every:
            step = (stopping.grace_steps // every + 1) * every
            reason = f"{stopping.grace_steps} takes effect at the next evaluation, step {step}"
            yield "early_stopping.grace_steps", reason
        yield from _noted_of_metric(sweep, stopping)


def _noted_of_metric(
    sweep: SweepConfig, stopping: ASHAStopping | MedianStopping
) -> Iterator[tuple[str, str]]:
    """What early stopping decides by, where that is not the metric as it is."""
    evaluation = sweep.trial.evaluation
    if stopping.sigma and not evaluation.standard_error:
        yield "early_stopping.sigma", "is ignored: evaluation.standard_error is false"
    if evaluation.proxy is not None and evaluation.is_proxy(stopping.grace_steps):
        reason = (
            f"{stopping.grace_steps} is within evaluation.proxy.until_step {evaluation.proxy.until_step}: "
            f"trials are stopped there by {evaluation.proxy_metric}, not by {evaluation.metric} "
            "(python -m dtr_ray.analyze proxy measures how far they agree)"
        )
        yield "early_stopping.grace_steps", reason


def _replaced(sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    """Values of a section that no trial keeps, since its searched `name` is always another."""
    for key, parameter in sweep.space.items():
        section, _, last = target(key).rpartition(".")
        if last != "name" or not isinstance(parameter, Choice) or parameter.when:
            continue
        base = _section(sweep.trial, section)
        if not isinstance(base, Config):
            continue
        own = [field for field in type(base).model_fields if field != "name" and _set(base, field)]
        name = getattr(base, "name", None)
        others = [value for value in parameter.values if value != name]
        if own and others and (name not in parameter.values or section in ("data", "model")):
            names = ", ".join(f"{section}.{field}" for field in own)
            reason = f"loses {names} where {target(key)} is {shown(others)}: a new name starts afresh"
            yield f"trial.{section}", reason


def _section(trial: TrialConfig, name: str) -> object:
    """A section by its dotted name; None where the trial's own variant has no such section."""
    found: object = trial
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _set(section: object, field: str) -> bool:
    """Whether a field differs from its default."""
    value: object = getattr(section, field)
    default: object = type(section).model_fields[field].default  # type: ignore[attr-defined]
    return value != default
