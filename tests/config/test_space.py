"""The order, conditions and corners of a search space."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dtr_ray.config.errors import RuleError
from dtr_ray.config.space import Space, active_parameters, by_key, corner_assignments, ordered, target

GAMMAS: dict[str, Any] = {
    "weighting.gamma": {"type": "choice", "values": [1, 5], "when": {"weighting.name": "min_snr"}},
    "weighting.gamma@p2": {"type": "uniform", "low": 0.5, "high": 2, "when": {"weighting.name": "p2"}},
    "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "p2"]},
}


def space(values: dict[str, Any]) -> Space:
    return TypeAdapter(Space).validate_python(values)


def test_a_parameter_comes_after_those_that_its_condition_names() -> None:
    assert ordered(space(GAMMAS)) == ["weighting.name", "weighting.gamma", "weighting.gamma@p2"]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vanilla", {"weighting.name": "vanilla"}),
        ("min_snr", {"weighting.name": "min_snr", "weighting.gamma": "from weighting.gamma"}),
        ("p2", {"weighting.name": "p2", "weighting.gamma": "from weighting.gamma@p2"}),
    ],
)
def test_parameters_exist_under_their_conditions_by_their_dotted_name(
    name: str, params: dict[str, Any]
) -> None:
    asked: list[str] = []

    def choose(key: str, parameter: Any) -> Any:
        asked.append(key)
        return name if key == "weighting.name" else f"from {key}"

    assert active_parameters(space(GAMMAS), choose) == params
    assert [target(key) for key in asked] == list(params)
    assert by_key(space(GAMMAS), params) == {key: params[target(key)] for key in asked}


def test_corners_are_all_combinations_that_exist() -> None:
    corners = list(corner_assignments(space(GAMMAS)))
    gammas = [(c["weighting.name"], c.get("weighting.gamma")) for c in corners]
    assert gammas == [("vanilla", None), ("min_snr", 1), ("min_snr", 5), ("p2", 0.5), ("p2", 2)]


def test_corners_beyond_the_limit_reach_every_value() -> None:
    many = space({f"p{i}": {"type": "uniform", "low": 0, "high": 1} for i in range(20)})
    corners = list(corner_assignments(many, limit=64))
    assert len(corners) == 128
    assert all({c[name] for c in corners} == {0, 1} for name in many)


def test_a_condition_may_name_several_values() -> None:
    both = space(
        {**GAMMAS, "k": {"type": "int", "low": 1, "high": 2, "when": {"weighting.name": ["p2", "vanilla"]}}}
    )
    assert {c["weighting.name"] for c in corner_assignments(both) if "k" in c} == {"p2", "vanilla"}


def test_a_condition_on_a_value_with_two_ranges_waits_for_both() -> None:
    chained = space(
        {"last": {"type": "int", "low": 1, "high": 2, "when": {"weighting.gamma": [5, 1.5]}}, **GAMMAS}
    )
    assert ordered(chained)[-1] == "last"
    assert {c["weighting.gamma"] for c in corner_assignments(chained) if "last" in c} == {5}


def test_two_ranges_that_can_exist_at_once_are_refused() -> None:
    always = {"weighting.gamma@p2": {"type": "uniform", "low": 0.5, "high": 2}}
    with pytest.raises(RuleError, match=r"can exist beside weighting\.gamma"):
        ordered(space({**GAMMAS, **always}))


@pytest.mark.parametrize(
    ("parameter", "inside", "outside"),
    [
        ({"type": "choice", "values": ["a", 1]}, ["a", 1], ["b", 2]),
        ({"type": "uniform", "low": 0, "high": 1}, [0, 0.3, 1], [-0.1, 1.1, "a", True]),
        (
            {"type": "quniform", "low": 0.5, "high": 1, "step": 0.1},
            [0.5, 0.6, 0.7, 1.0],
            [0.55, 0.4, 1.1, "a"],
        ),
        ({"type": "int", "low": 1, "high": 9, "step": 2}, [1, 3, 9], [2, 11, 3.0, "a"]),
    ],
)
def test_a_range_holds_its_own_values(
    parameter: dict[str, Any], inside: list[Any], outside: list[Any]
) -> None:
    built = space({"x": parameter})["x"]
    assert all(built.holds(value) for value in inside)
    assert not any(built.holds(value) for value in outside)


@given(st.integers(1, 40), st.floats(-100, 100), st.sampled_from([0.05, 0.1, 0.25, 0.3, 1.0, 7.0]))
def test_a_grid_is_divided_by_its_step_and_holds_all_its_points(count: int, low: float, step: float) -> None:
    grid = space({"x": {"type": "quniform", "low": low, "high": low + count * step, "step": step}})["x"]
    assert all(grid.holds(min(low + i * step, grid.corners()[1])) for i in range(count + 1))
