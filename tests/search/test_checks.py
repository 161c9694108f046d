"""Affinity files of all that a sweep can draw are looked at before anything starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sweeps import tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.diffusion.affinity import Affinity
from dtr_ray.search.checks import check_trials


def choice(*values: Any, **when: Any) -> dict[str, Any]:
    return {
        "type": "choice",
        "values": list(values),
        "when": {k.replace("__", "."): v for k, v in when.items()},
    }


def write(path: Path, num_timesteps: int, num_measured: int = 20) -> str:
    timesteps = np.linspace(0, num_timesteps - 1, num_measured).astype(np.int64)
    Affinity(np.eye(num_measured), timesteps, num_timesteps).save(path)
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> str:
    """A file for the default, 1000 timesteps."""
    return write(tmp_path / "good.npz", 1000)


def sweep(
    root: Path, space: dict[str, Any], weighting: dict[str, Any] | None = None, **changes: Any
) -> SweepConfig:
    changes |= {"trial__weighting": weighting} if weighting is not None else {}
    return tiny_sweep(root, space=space, **changes)


def by_affinity(path: str, **rest: Any) -> dict[str, Any]:
    return {"name": "ant_nash", "intervals": {"name": "affinity", "from": path}, **rest}


def test_a_sweep_whose_files_serve_passes(good: str, tmp_path: Path):
    alpha = {"routing.alpha": choice(1, 2)}
    check_trials(sweep(tmp_path, alpha, by_affinity(good)))
    check_trials(sweep(tmp_path, alpha))
    check_trials(sweep(tmp_path, {"weighting.num_clusters": choice(2, 20)}, by_affinity(good)))


def test_the_base_trials_file_is_named(tmp_path: Path):
    other = write(tmp_path / "other.npz", 500)
    with pytest.raises(
        ValueError, match=r"^trial.weighting.intervals.from: '.*other.npz' is of 500 timesteps"
    ):
        check_trials(sweep(tmp_path, {"routing.alpha": choice(1, 2)}, by_affinity(other)))


def test_a_searched_file_is_named_with_the_values_that_lead_to_it(good: str, tmp_path: Path):
    space = {
        "routing.alpha": choice(1, 2),
        "weighting.name": choice("vanilla", "ant_uw"),
        "weighting.intervals.name": choice("uniform", "affinity", weighting__name="ant_uw"),
        "weighting.intervals.from": choice(
            good, str(tmp_path / "no.npz"), weighting__intervals__name="affinity"
        ),
    }
    with pytest.raises(ValueError, match=r"^space: with .*weighting.intervals.from = '.*no.npz'") as raised:
        check_trials(sweep(tmp_path, space))
    assert "does not exist" in str(raised.value)
    assert "alpha" not in str(raised.value)
    write(tmp_path / "no.npz", 1000)
    check_trials(sweep(tmp_path, space))


def test_a_searched_number_of_clusters_is_held_against_the_file(good: str, tmp_path: Path):
    space = {"weighting.num_clusters": {"type": "int", "low": 2, "high": 21}}
    with pytest.raises(ValueError, match=r"with weighting.num_clusters = 21: .* the 20 timesteps"):
        check_trials(sweep(tmp_path, space, by_affinity(good)))


def test_a_searched_number_of_timesteps_is_held_against_the_file(good: str, tmp_path: Path):
    space = {"diffusion.num_timesteps": choice(500, 1000)}
    with pytest.raises(ValueError, match=r"with diffusion.num_timesteps = 500: .* is of 1000 timesteps"):
        check_trials(sweep(tmp_path, space, by_affinity(good)))


def test_what_only_other_parameters_allow_is_no_mistake(good: str, tmp_path: Path):
    # 40 intervals go with many timesteps alone, which the condition sees to.
    space = {
        "diffusion.num_timesteps": choice(30, 1000),
        "weighting.name": choice("ant_uw"),
        "weighting.num_clusters": choice(8, diffusion__num_timesteps=30),
        "weighting.num_clusters@many": choice(40, diffusion__num_timesteps=1000),
    }
    check_trials(sweep(tmp_path, space, trial__sampling__num_steps=20))


def test_of_starting_points_alone_only_these_are_looked_at(good: str, tmp_path: Path):
    space = {
        "weighting.name": choice("vanilla", "ant_uw"),
        "weighting.intervals.name": choice("uniform", "affinity", weighting__name="ant_uw"),
        "weighting.intervals.from": choice(good, "no.npz", weighting__intervals__name="affinity"),
    }
    point = {
        "weighting.name": "ant_uw",
        "weighting.intervals.name": "affinity",
        "weighting.intervals.from": good,
    }
    search = {"sampler": "points", "starting_points": [point]}
    check_trials(sweep(tmp_path, space, search=search))
    search["starting_points"].append(point | {"weighting.intervals.from": "no.npz"})
    with pytest.raises(ValueError, match=r"'no\.npz' does not exist"):
        check_trials(sweep(tmp_path, space, search=search))


def test_a_large_space_is_looked_at_in_full(good: str, tmp_path: Path):
    # 4,096 combinations of what does not matter.
    others = {
        f"training.{name}": choice(*range(1, 9)) for name in ("log_every_steps", "seed", "accumulation_steps")
    }
    others["routing.alpha"] = choice(*range(1, 9))
    space = others | {
        "weighting.name": choice("ant_uw", "ant_nash"),
        "weighting.intervals.name": choice("uniform", "affinity"),
        "weighting.intervals.from": choice(good, "no.npz", weighting__intervals__name="affinity"),
    }
    with pytest.raises(ValueError, match=r"'no\.npz' does not exist"):
        check_trials(sweep(tmp_path, space))
