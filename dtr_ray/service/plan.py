"""The plan of a sweep: what it will search, run, need and leave behind, told before anything starts."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dtr_ray.config import SweepConfig
from dtr_ray.config.protocol import Protocol, describe, protocol_of
from dtr_ray.config.space import Choice, Integer, LogUniform, Parameter, Quantised, Uniform
from dtr_ray.config.sweep import ASHAStopping, MedianStopping
from dtr_ray.disk import free_bytes
from dtr_ray.models import build_model
from dtr_ray.search.database import without_password
from dtr_ray.search.stopping import rungs
from dtr_ray.service import cluster
from dtr_ray.service.storage import Storage, storage_of
from dtr_ray.service.storing import place_of
from dtr_ray.service.tracking import default_tracking_uri
from dtr_ray.storage.address import is_url, results_root
from dtr_ray.training.retention import LASTING


@dataclass(frozen=True)
class Plan:
    """The figures of a sweep."""

    num_trials: int
    num_concurrent: int
    """Trials side by side; 0 where not one fits."""
    num_parameters: int
    """Of one model."""
    max_steps: int
    """Training steps if no trial were stopped early."""
    expected_steps: int
    """Training steps when early stopping lets the expected share go on at each rung."""
    max_images: int
    max_evaluations: int
    storage: Storage
    """What the sweep's folder holds at most."""


def make_plan(config: SweepConfig, machines: list[cluster.Node]) -> Plan:
    """Works the plan out for a cluster of `machines`."""
    trial, search = config.trial, config.search
    with torch.device("meta"):
        model = build_model(trial.resolved_model, None, trial.diffusion.num_timesteps)
    num_parameters = sum(p.numel() for p in model.parameters())
    full = trial.training.num_steps
    expected = float(full)
    if isinstance(config.early_stopping, ASHAStopping):
        stages = [*rungs(config.early_stopping, full), full]
        share = [config.early_stopping.reduction_factor**-i for i in range(len(stages))]
        lengths = [stages[0], *(b - a for a, b in itertools.pairwise(stages))]
        expected = sum(s * length for s, length in zip(share, lengths, strict=True))
    try:
        num_concurrent = cluster.num_concurrent_trials(config.resources, machines)
    except cluster.TooSmallError:
        num_concurrent = 0
    return Plan(
        num_trials=search.num_trials,
        num_concurrent=num_concurrent,
        num_parameters=num_parameters,
        max_steps=search.num_trials * full,
        expected_steps=round(search.num_trials * expected),
        max_images=search.num_trials * full * trial.training.batch_size,
        max_evaluations=search.num_trials * -(-full // trial.evaluation.every_steps),
        storage=storage_of(config, num_concurrent),
    )


def print_plan(config: SweepConfig, folder: Path, console: Console | None = None) -> None:
    """Prints the resolved plan for this machine; starts nothing."""
    console = console or Console()
    machines = cluster.local_nodes()
    plan = make_plan(config, machines)
    title = f"sweep {config.name}: {plan.num_trials} trials, minimise {config.objective}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("parameter", "values", "when"):
        table.add_column(heading)
    for name, parameter in config.space.items():
        table.add_row(name, describe_range(parameter), describe_condition(parameter))
    console.print(table)
    for key, value in _rows(config, plan, folder, cluster.describe_nodes(machines)):
        console.print(f"{key:>15}  {value}", highlight=False, markup=False, soft_wrap=True)


def _rows(config: SweepConfig, plan: Plan, folder: Path, machines: str) -> Iterator[tuple[str, str]]:
    trial, search = config.trial, config.search
    points = f", {len(search.points)} starting points" if search.starting_points else ""
    yield "search", f"{search.sampler}, seed {search.seed}{points}"
    yield "early stopping", _describe_stopping(config)
    yield (
        "one trial",
        f"{cluster.describe(config.resources)}, up to {trial.training.num_steps:,} steps of "
        f"{trial.training.batch_size} images, a model of {plan.num_parameters / 1e6:.2g}M parameters",
    )
    if plan.num_concurrent:
        yield "side by side", f"{plan.num_concurrent} on this machine ({machines})"
    else:
        yield "side by side", f"none on this machine ({machines}): it is too small for one trial"
    expected = f", about {plan.expected_steps:,}" if plan.expected_steps < plan.max_steps else ""
    yield "steps", f"{plan.max_steps:,} at most{expected}"
    yield "images", f"{plan.max_images:,} at most"
    sampling = f"{trial.sampling.sampler}, {trial.sampling.num_steps} steps"
    samples = f"{trial.evaluation.num_samples:,} samples ({sampling})"
    yield "evaluations", f"{plan.max_evaluations:,} at most, of {samples}"
    yield from _proxy_rows(config)
    yield "measured", describe(protocol_of(trial))
    yield "storage", _describe_storage(plan.storage, place_of(config, folder))
    yield "budget", _describe_budget(config)
    yield (
        "MLflow",
        without_password(
            config.tracking.uri or default_tracking_uri(results_root(config.storage.output, folder))
        ),
    )


def _proxy_rows(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """What early evaluations report instead, what that decides, and what it saves."""
    trial, proxy = config.trial, config.trial.evaluation.proxy
    if proxy is None:
        return
    full, cheap = (protocol_of(trial, proxy=which) for which in (False, True))
    cost = passes(cheap) / passes(full)
    steps = evaluation_steps(config)
    num_proxies = sum(map(trial.evaluation.is_proxy, steps))
    saved = num_proxies * (1 - cost) / len(steps)
    how = f"{cheap['evaluation.num_samples']:,} samples ({cheap['sampling.sampler']}, "
    how += f"{cheap['sampling.num_steps']} steps)"
    yield (
        "proxies",
        f"{num_proxies} of a trial's {len(steps)} evaluations, to step {proxy.until_step:,}: "
        f"{trial.evaluation.proxy_metric} of {how}",
    )
    decided = [s for s in _decisions(config) if s <= proxy.until_step]
    stopping = (
        f"; trials are stopped by it at steps {', '.join(f'{s:,}' for s in decided)}" if decided else ""
    )
    yield "saved by them", f"{saved:.0%} of the sampling of a whole trial, one costs {cost:.2g}{stopping}"


def evaluation_steps(config: SweepConfig) -> list[int]:
    """Training steps at which a whole trial is evaluated."""
    training, every = config.trial.training, config.trial.evaluation.every_steps
    return sorted({*range(every, training.num_steps + 1, every), training.num_steps})


def passes(protocol: Protocol) -> int:
    """Passes through the network that an evaluation takes: samples times the sampler's steps."""
    return int(protocol["evaluation.num_samples"] * protocol["sampling.num_steps"])


def _decisions(config: SweepConfig) -> list[int]:
    """Evaluations after which a trial can be stopped."""
    rule, steps = config.early_stopping, evaluation_steps(config)
    if isinstance(rule, ASHAStopping):
        marks = rungs(rule, config.trial.training.num_steps)
        return sorted({min((s for s in steps if s >= mark), default=steps[-1]) for mark in marks})
    return [s for s in steps if s >= rule.grace_steps] if isinstance(rule, MedianStopping) else []


def _describe_storage(storage: Storage, place: str) -> str:
    free = math.inf if is_url(place) else free_bytes(Path(place))[0]
    short = "" if free > storage.total else f"; but only {free / 1e9:.2g} GB are free there"
    return (
        f"{storage.total / 1e9:.2g} GB at most in {place}: {storage.num_checkpoints} checkpoints of "
        f"{storage.checkpoint / 1e9:.2g} GB ({LASTING} a trial, the best and the last, and one more while it "
        f"trains), and {storage.rest / 1e9:.2g} GB of samples and records{short}"
    )


def _describe_budget(config: SweepConfig) -> str:
    hours, device_hours = config.budget.max_hours, config.budget.max_device_hours
    limits = [f"{config.search.num_trials} trials"]
    limits += [f"{hours:g} hours"] if hours else []
    limits += [f"{device_hours:g} device-hours"] if device_hours else []
    return " or ".join(limits)


def describe_range(parameter: Parameter) -> str:
    """A parameter's values in words."""
    if isinstance(parameter, Choice):
        return ", ".join(map(str, parameter.values))
    assert isinstance(parameter, Uniform | LogUniform | Quantised | Integer)
    step = getattr(parameter, "step", None)
    log = isinstance(parameter, LogUniform) or getattr(parameter, "log", False)
    return (
        f"{parameter.low:g} to {parameter.high:g}{f' by {step:g}' if step else ''}{' (log)' if log else ''}"
    )


def describe_condition(parameter: Parameter) -> str:
    """When a parameter exists, in words."""
    return " and ".join(
        f"{name} is {' or '.join(map(str, wanted)) if isinstance(wanted, list) else wanted}"
        for name, wanted in parameter.when.items()
    )


def _describe_stopping(config: SweepConfig) -> str:
    rule = config.early_stopping
    if isinstance(rule, ASHAStopping):
        steps = ", ".join(f"{s:,}" for s in rungs(rule, config.trial.training.num_steps))
        return f"ASHA, best 1/{rule.reduction_factor:g} go on at steps {steps}"
    return "none" if rule.name == "none" else f"median from step {rule.grace_steps:,}"
