"""The search space: which parameters are searched, over which values, and when they exist.

A space is keyed by the parameter's dotted name in the trial, `routing.alpha`. A parameter whose range depends
on another's value is listed once a range, told apart by an alias after `@`, which the trial never sees:

    weighting.gamma:    {type: choice, values: [1, 5], when: {weighting.name: min_snr}}
    weighting.gamma@p2: {type: uniform, low: 0.5, high: 2, when: {weighting.name: p2}}
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config
from dtr_ray.config.errors import Problem, RuleError, broken, shown, suggestion

Scalar = bool | int | float | str


class Parameter(Config):
    """What all searched parameters share."""

    when: dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1)]] = {}
    """Other searched parameters and the value (or values) at which this one exists."""

    def exists(self, params: dict[str, Any]) -> bool:
        """Whether the parameter exists beside the parameters (by their dotted names) chosen so far."""
        return all(
            name in params and params[name] in wanted_values(wanted) for name, wanted in self.when.items()
        )


def wanted_values(wanted: Scalar | list[Scalar]) -> list[Scalar]:
    """The values that an entry of `when` waits for."""
    return wanted if isinstance(wanted, list) else [wanted]


class Choice(Parameter):
    """One of a list of values."""

    type: Literal["choice"]
    values: Annotated[list[Scalar], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        # By Python's equality (1 == 1.0 == true), as a sampler finds a value in the list.
        if len(set(self.values)) < len(self.values):
            raise broken("values", f"values repeat: {shown(self.values)}")
        return self

    def corners(self) -> list[Any]:
        """Values whose validity stands for the whole range's."""
        return list(self.values)

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the choices."""
        return value in self.values


class Numeric(Parameter):
    """What ranges of numbers share; the subclasses say of which type `low` and `high` are."""

    low: Any
    high: Any

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise broken("low", f"low {shown(self.low)} is not below high {shown(self.high)}", "high")
        return self

    def corners(self) -> list[Any]:
        """Values whose validity stands for the whole range's."""
        return [self.low, self.high]

    def holds(self, value: Any) -> bool:
        """Whether the value is a number in the range, and on its grid."""
        return type(value) in (int, float) and bool(self.low <= value <= self.high)


class Range(Numeric):
    """What ranges of floats share."""

    low: float
    high: float


class Uniform(Range):
    """A float, uniform in [low, high]."""

    type: Literal["uniform"]


class LogUniform(Range):
    """A float in [low, high], uniform in its logarithm."""

    type: Literal["loguniform"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low <= 0:
            raise broken("low", f"low of a loguniform range must be above 0, got {shown(self.low)}")
        return self


class Quantised(Range):
    """A float in [low, high] on a grid of width `step`, both ends included."""

    type: Literal["quniform"]
    step: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = (self.high - self.low) / self.step
        if not math.isfinite(steps) or not math.isclose(steps, round(steps), rel_tol=1e-9):
            given = f"from {shown(self.low)} to {shown(self.high)}"
            raise broken("step", f"step {shown(self.step)} does not divide the range {given}", "low", "high")
        return self

    def holds(self, value: Any) -> bool:
        """Whether the value is a number in the range, and on its grid."""
        steps = (value - self.low) / self.step if super().holds(value) else 0.5
        return math.isclose(steps, round(steps), abs_tol=1e-9)


class Integer(Numeric):
    """An integer in [low, high], both included, on a grid of width `step`."""

    type: Literal["int"]
    low: int
    high: int
    step: Annotated[int, Field(gt=0)] = 1
    log: bool = False
    """Uniform in its logarithm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.high - self.low) % self.step:
            rule = f"step {self.step} does not divide the range from {self.low} to {self.high}"
            raise broken("step", rule, "low", "high")
        if self.log and (self.low <= 0 or self.step != 1):
            rule = f"log needs low above 0 and step 1, got low {self.low} and step {self.step}"
            raise broken("log", rule, "low", "step")
        return self

    def holds(self, value: Any) -> bool:
        """Whether the value is an integer in the range, and on its grid."""
        return isinstance(value, int) and super().holds(value) and (value - self.low) % self.step == 0


ParameterConfig = Annotated[Choice | Uniform | LogUniform | Quantised | Integer, Field(discriminator="type")]
Space = dict[str, ParameterConfig]


def target(key: str) -> str:
    """The dotted name of the trial's value that a key of the space searches: the key without its alias."""
    return key.partition("@")[0]


def ordered(space: Space) -> list[str]:
    """Keys of the space, each after all keys of the parameters that its `when` names.

    Raises RuleError where a `when` names an unknown parameter, a value never taken, or itself, and where two
    keys could search the same value at once.
    """
    problems = list(_wrong_conditions(space)) or list(_clashes(space))
    if problems:
        raise RuleError(*problems)
    done: list[str] = []
    while len(done) < len(space):
        left = [key for key in space if key not in done]
        waited_for = {target(key) for key in left}
        ready = [key for key in left if not waited_for & set(space[key].when)]
        if not ready:
            raise RuleError(Problem((left[0], "when"), f"goes in a circle: {', '.join(left)}"))
        done.extend(ready)
    return done


def _wrong_conditions(space: Space) -> Iterator[Problem]:
    names = list(dict.fromkeys(target(key) for key in space))
    for key, parameter in space.items():
        for other, wanted in parameter.when.items():
            path = (key, "when", other)
            ranges = [space[k] for k in space if target(k) == other]
            if not ranges:
                yield Problem(path, f"{other} is not searched; {suggestion(other, names)}")
            for value in wanted_values(wanted):
                if ranges and not any(r.holds(value) for r in ranges):
                    known = [v for r in ranges if isinstance(r, Choice) for v in r.values]
                    hint = suggestion(value, [str(v) for v in known]) if known else "outside its range"
                    yield Problem(path, f"{other} is never {shown(value)}; {hint}")


def _clashes(space: Space) -> Iterator[Problem]:
    for first, second in itertools.combinations(space, 2):
        if target(first) == target(second) and not _exclude(space[first], space[second]):
            rule = f"can exist beside {first}: give each a `when` with other values of one parameter"
            yield Problem((second,), rule)


def _exclude(first: Parameter, second: Parameter) -> bool:
    shared = first.when.keys() & second.when.keys()
    return any(not set(wanted_values(first.when[n])) & set(wanted_values(second.when[n])) for n in shared)


def active_parameters(space: Space, choose: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The parameters of one trial by dotted name, chosen one after the other.

    `choose(key, parameter)` is asked for each parameter that exists beside those chosen so far; `key` is
    unique in the space (`weighting.gamma@p2`), so it can name the parameter in a study.
    """
    params: dict[str, Any] = {}
    for key in ordered(space):
        if space[key].exists(params):
            params[target(key)] = choose(key, space[key])
    return params


def by_key(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters, given by dotted name, by the keys of the space under which they are searched."""
    return {
        key: params[target(key)]
        for key, parameter in space.items()
        if target(key) in params and parameter.exists(params)
    }


def expanded(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A starting point for each combination of the values in its lists, the last list changing first."""
    lists = [value if isinstance(value, list) else [value] for value in point.values()]
    for values in itertools.product(*lists):
        yield dict(zip(point, values, strict=True))


def corner_assignments(space: Space, limit: int = 1024) -> Iterator[dict[str, Any]]:
    """Combinations of the ranges' ends and all choices, conditions kept: to validate before any work starts.

    All of them where there are at most `limit`, else as many random ones.
    """
    order = ordered(space)
    seen: set[str] = set()
    for params in itertools.islice(_corners(space, order, {}), limit + 1):
        seen.add(repr(params))
        if len(seen) <= limit:
            yield params
    if len(seen) > limit:
        # The first ones differ in the last parameters alone: these reach the others.
        rng = random.Random(0)
        for _ in range(limit):
            yield active_parameters(space, lambda _, parameter: rng.choice(parameter.corners()))


def _corners(space: Space, keys: list[str], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not keys:
        yield params
    elif not space[keys[0]].exists(params):
        yield from _corners(space, keys[1:], params)
    else:
        for value in space[keys[0]].corners():
            yield from _corners(space, keys[1:], {**params, target(keys[0]): value})
