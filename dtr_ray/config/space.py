"""The search space: which parameters are searched, over which values, and when they exist."""

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config

Scalar = bool | int | float | str


class Parameter(Config):
    """What all searched parameters share."""

    when: dict[str, Scalar | list[Scalar]] = {}
    """Other searched parameters and the value (or values) at which this one exists."""

    def exists(self, params: dict[str, Any]) -> bool:
        """Whether the parameter exists beside the parameters chosen so far."""
        return all(
            name in params and params[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )


class Choice(Parameter):
    """One of a list of values."""

    type: Literal["choice"]
    values: Annotated[list[Scalar], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({(type(v).__name__, v) for v in self.values}) < len(self.values):
            raise ValueError(f"values repeat: {self.values}")
        return self

    def corners(self) -> list[Any]:
        """Values whose validity stands for the whole range's."""
        return list(self.values)


class Range(Parameter):
    """What numeric ranges share."""

    low: float
    high: float

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self

    def corners(self) -> list[Any]:
        """Values whose validity stands for the whole range's."""
        return [self.low, self.high]


class Uniform(Range):
    """A float, uniform in [low, high]."""

    type: Literal["uniform"]


class LogUniform(Range):
    """A float in [low, high], uniform in its logarithm."""

    type: Literal["loguniform"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low <= 0:
            raise ValueError(f"low {self.low} of a loguniform range is not above 0")
        return self


class Quantised(Range):
    """A float in [low, high] on a grid of width `step`, the upper end included where the grid meets it."""

    type: Literal["quniform"]
    step: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = (self.high - self.low) / self.step
        if not math.isclose(steps, round(steps), rel_tol=1e-9):
            raise ValueError(f"step {self.step} does not divide the range from {self.low} to {self.high}")
        return self


class Integer(Parameter):
    """An integer in [low, high], both included, on a grid of width `step`."""

    type: Literal["int"]
    low: int
    high: int
    step: Annotated[int, Field(gt=0)] = 1
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.low <= 0 or self.step != 1):
            raise ValueError("log needs low above 0 and step 1")
        return self

    def corners(self) -> list[Any]:
        """Values whose validity stands for the whole range's."""
        return [self.low, self.high]


ParameterConfig = Annotated[
    Choice | Uniform | LogUniform | Quantised | Integer, Field(discriminator="type")
]
Space = dict[str, ParameterConfig]


def ordered(space: Space) -> list[str]:
    """Names of the parameters, each after those that its `when` names.

    Raises ValueError where a `when` names an unknown parameter, a value never taken, or itself.
    """
    for name, parameter in space.items():
        for other, wanted in parameter.when.items():
            if other not in space:
                raise ValueError(f"{name}: `when` names {other}, which is not searched")
            condition = space[other]
            if isinstance(condition, Choice):
                unknown = [v for v in (wanted if isinstance(wanted, list) else [wanted]) if v not in condition.values]
                if unknown:
                    raise ValueError(f"{name}: `when` waits for {other} = {unknown[0]}, which is not in {condition.values}")
    done: list[str] = []
    while len(done) < len(space):
        ready = [n for n, p in space.items() if n not in done and all(o in done for o in p.when)]
        if not ready:
            raise ValueError(f"`when` goes in a circle: {', '.join(n for n in space if n not in done)}")
        done.extend(ready)
    return done


def corner_assignments(space: Space, limit: int = 4096) -> Iterator[dict[str, Any]]:
    """Combinations of the ranges' ends and all choices, conditions kept: to validate before any work starts."""
    names = ordered(space)
    seen: set[str] = set()
    for values in itertools.islice(itertools.product(*(space[n].corners() for n in names)), limit):
        params: dict[str, Any] = {}
        for name, value in zip(names, values, strict=True):
            if space[name].exists(params):
                params[name] = value
        key = repr(params)
        if key not in seen:
            seen.add(key)
            yield params
