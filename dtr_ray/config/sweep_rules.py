"""Rules between the parts of a sweep: every trial that the space can draw must be one that can run."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dtr_ray.config.base import override
from dtr_ray.config.errors import Path, Problem, RuleError, dotted, shown, suggestion
from dtr_ray.config.explain import problems
from dtr_ray.config.fields import dotted_names, sections
from dtr_ray.config.protocol import SOURCES, differing, protocol_of
from dtr_ray.config.space import by_key, corner_assignments, expanded, target
from dtr_ray.config.trial import TrialConfig

if TYPE_CHECKING:
    from dtr_ray.config.sweep import SweepConfig

_METRIC_KEYS = (("trial", "evaluation", "num_samples"), ("trial", "evaluation", "features"))


def trial_name(name: str) -> str:
    """Checks the dotted name of a value in the trial; raises RuleError with the near miss."""
    if name not in dotted_names(TrialConfig):
        rule = f"no value of a trial; {suggestion(name, dotted_names(TrialConfig))}"
        if name in sections(TrialConfig):
            inside = ", ".join(known for known in dotted_names(TrialConfig) if known.startswith(f"{name}."))
            rule = f"a whole section; name one value by its dotted name: {inside}"
        raise RuleError(Problem((), rule))
    return name


def space_key(key: str) -> str:
    """Checks a key of the space: the dotted name of a value, and perhaps `@` and an alias."""
    name, at, alias = key.partition("@")
    trial_name(name)
    if at and not alias.replace("_", "").replace("-", "").isalnum():
        rule = f"the alias after @ must be of letters, digits, _ and -; got {shown(alias)}"
        raise RuleError(Problem((), rule))
    return key


def sweep_problems(sweep: "SweepConfig") -> Iterator[Problem]:
    """What is wrong with a sweep whose parts are right one by one."""
    if sweep.metric not in (None, sweep.objective):
        rule = f"{sweep.metric!r} is not what the trials report: leave it out, or write {sweep.objective}"
        yield Problem(("metric",), rule, _METRIC_KEYS)
    in_points = list(_unique(_all_point_problems(sweep)))
    yield from in_points
    # With points nothing else of the space is run, so that nothing else has to be valid.
    if sweep.search.sampler != "points":
        yield from _unique(_space_problems(sweep, corner_assignments(sweep.space)))
    elif not in_points:
        yield from _unique(_space_problems(sweep, sweep.search.points))
    try:
        TrialConfig.from_dict(override(sweep.trial.to_dict(), sweep.best))
    except ValidationError as error:
        for problem in problems(error, TrialConfig):
            yield _of_change(problem, "best", {name: name for name in sweep.best}, sweep.best)


def _unique(found: Iterable[Problem]) -> Iterator[Problem]:
    """One problem a key: the ends of one range often break the same rule."""
    seen: set[Path] = set()
    for problem in found:
        if problem.path not in seen:
            seen.add(problem.path)
            yield problem


def _space_problems(sweep: "SweepConfig", assignments: Iterable[dict[str, Any]]) -> Iterator[Problem]:
    for params in assignments:
        keys = {target(key): key for key in by_key(sweep.space, params)}
        try:
            trial = sweep.trial_config(params)
        except ValidationError as error:
            for problem in problems(error, TrialConfig):
                yield _of_change(problem, "space", keys, params)
            continue
        for problem in _trial_problems(sweep, trial):
            changed = [p for p in problem.also if p[0] == "trial" and dotted(p[1:]) in params]
            yield Problem(("space", keys[dotted(changed[0][1:])]), problem.rule) if changed else problem


def _of_change(problem: Problem, where: str, keys: dict[str, str], changes: dict[str, Any]) -> Problem:
    """A trial's problem, told of the change (key of `space` or `best`) that brought it about."""
    name = dotted(problem.path)
    involved = [n for n in (name, *map(dotted, problem.also)) if n in changes]
    if name in changes and len(involved) == 1 and not problem.also:
        rule, chosen_by = problem.rule, f"{name.split('.')[0]}.name"
        if where == "space" and rule.startswith("expected a whole number"):
            rule = "is a whole number: search it with type: int or choice"
        if where == "space" and rule.startswith("does not exist under") and chosen_by in changes:
            rule += f": give it a `when` with {chosen_by}"
        return Problem((where, keys[name]), rule)
    shown_names = involved or [n for n in changes if n.split(".")[0] == name.split(".")[0]] or list(changes)
    given = ", ".join(f"{n} = {shown(changes[n])}" for n in shown_names)
    path = (where, keys[shown_names[0]]) if shown_names else (where,)
    return Problem(path, f"with {given}: {name}: {problem.rule}")


def _trial_problems(sweep: "SweepConfig", trial: TrialConfig) -> Iterator[Problem]:
    """What keeps one of the trials from being run and compared with the others."""
    yield from _protocol_problems(sweep, trial)
    steps, batch_size = trial.training.num_steps, trial.training.batch_size
    grace = getattr(sweep.early_stopping, "grace_steps", 0)
    if grace > steps:
        rule = f"{grace} is more than trial.training.num_steps {steps}: no trial could be stopped"
        yield Problem(("early_stopping", "grace_steps"), rule, (("trial", "training", "num_steps"),))
    workers = sweep.resources.workers_per_trial
    if batch_size % workers:
        rule = f"{workers} workers do not divide trial.training.batch_size {batch_size}"
        yield Problem(("resources", "workers_per_trial"), rule, (("trial", "training", "batch_size"),))
    least = sweep.resources.least_workers
    if least < workers and batch_size % least:
        rule = f"{least} workers do not divide trial.training.batch_size {batch_size}"
        yield Problem(("resources", "min_workers_per_trial"), rule, (("trial", "training", "batch_size"),))


def _protocol_problems(sweep: "SweepConfig", trial: TrialConfig) -> Iterator[Problem]:
    """What would have one of the trials measured otherwise than the others."""
    if trial.evaluation.metric != sweep.objective:
        rule = f"trials would report {trial.evaluation.metric} instead of {sweep.objective}: not comparable"
        yield Problem(("space",), rule, _METRIC_KEYS)
    ours, theirs = protocol_of(sweep.trial), protocol_of(trial)
    for key in differing(theirs, ours):
        rule = (
            f"is part of what the metric measures ({key} {shown(theirs[key])}, but {shown(ours[key])} in the "
            "trial): figures of different protocols do not compare; do not search it, but set it in trial"
        )
        keys = SOURCES.get(key, (key,))
        yield Problem(("space",), rule, tuple(("trial", *name.split(".")) for name in keys))
    if sweep.trial.evaluation.proxy is None and trial.evaluation.proxy is None:
        return
    for key in ("evaluation.every_steps", *(n for n in dotted_names(TrialConfig) if ".proxy." in n)):
        if _value(trial, key) != _value(sweep.trial, key):
            rule = f"{key} cannot be searched with a proxy: at one step, trials would report other figures"
            yield Problem(("space",), rule, (("trial", *key.split(".")),))


def _value(trial: TrialConfig, key: str) -> Any:
    """A value by its dotted name; None below a section that is not there."""
    found: Any = trial
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def _all_point_problems(sweep: "SweepConfig") -> Iterator[Problem]:
    for number, point in enumerate(sweep.search.starting_points):
        for combination in expanded(point):
            yield from _point_problems(sweep, number, combination)


def _point_problems(sweep: "SweepConfig", number: int, point: dict[str, Any]) -> Iterator[Problem]:
    keys = {target(key): key for key in by_key(sweep.space, point)}
    names = list(dict.fromkeys(map(target, sweep.space)))
    for name, value in point.items():
        path = ("search", "starting_points", number, name)
        if name not in names:
            yield Problem(path, f"is not searched; {suggestion(name, names)}")
        elif name not in keys:
            ranges = [sweep.space[key] for key in sweep.space if target(key) == name]
            wanted = " or ".join(shown_condition(parameter.when) for parameter in ranges)
            yield Problem(path, f"does not exist in this point: it needs {wanted}")
        elif not sweep.space[keys[name]].holds(value):
            rule = f"{shown(value)} is outside its range: {shown_range(sweep.space[keys[name]])}"
            yield Problem(path, rule)
    missing = [target(key) for key, p in sweep.space.items() if p.exists(point) and target(key) not in point]
    if sweep.search.sampler == "points" and missing:
        rule = f"leaves out {', '.join(missing)}: with sampler points, each point gives all that it searches"
        yield Problem(("search", "starting_points", number), rule)


def shown_condition(when: dict[str, Any]) -> str:
    """A `when` in words: `weighting.name = min_snr`."""
    return " and ".join(f"{name} = {shown(wanted)}" for name, wanted in when.items())


def shown_range(parameter: Any) -> str:
    """A range in words: `0.5 to 8 in steps of 0.5`."""
    if parameter.type == "choice":
        return f"one of {shown(parameter.values)}"
    step = getattr(parameter, "step", None)
    steps = f" in steps of {shown(step)}" if step else ""
    return f"{shown(parameter.low)} to {shown(parameter.high)}{steps}"
