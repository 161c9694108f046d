"""What is checked of all trials that a sweep can draw before any starts, beyond the rules of its file."""

from typing import Any

from pydantic import TypeAdapter

from dtr_ray.config import SweepConfig, override
from dtr_ray.config.errors import shown
from dtr_ray.config.space import Space, corner_assignments, target
from dtr_ray.config.trial import DiffusionConfig
from dtr_ray.config.weighting import WeightingConfig
from dtr_ray.diffusion.intervals import check_intervals

_SECTIONS = ("weighting", "diffusion")
_WEIGHTING: TypeAdapter[WeightingConfig] = TypeAdapter(WeightingConfig)


def check_trials(config: SweepConfig) -> None:
    """Checks the affinity files of all trials that the space or the starting points can draw.

    Raises:
        ValueError: as `check_intervals`; the message names the values that lead to the file.
    """
    decisive = _decisive(config.space)
    names = {target(key) for key in decisive}
    base = config.trial.to_dict()
    only_points = config.search.sampler == "points"
    seen = set()
    for params in config.search.points if only_points else corner_assignments(decisive):
        chosen = {name: value for name, value in params.items() if name in names}
        if repr(chosen) in seen:
            continue
        seen.add(repr(chosen))
        trial: dict[str, Any] = override(base, chosen)
        weighting = _WEIGHTING.validate_python(trial["weighting"])
        try:
            check_intervals(weighting, DiffusionConfig.from_dict(trial["diffusion"]))
        except ValueError as error:
            given = ", ".join(f"{name} = {shown(value)}" for name, value in chosen.items())
            raise ValueError(f"space: with {given}: {error}" if given else f"trial.{error}") from error


def _decisive(space: Space) -> Space:
    """The part of the space that decides about intervals, with all that its `when` conditions wait for."""
    wanted = {target(key) for key in space if target(key).split(".")[0] in _SECTIONS}
    while True:
        found = {key: parameter for key, parameter in space.items() if target(key) in wanted}
        more = wanted | {name for parameter in found.values() for name in parameter.when}
        if more == wanted:
            return found
        wanted = more
