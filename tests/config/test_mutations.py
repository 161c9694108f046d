"""Whatever is done to a right file, reading it gives a config or a ConfigError, nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_yaml import GOOD
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.read import read_sweep
from dtr_ray.config.tree import parse_value

QUICKSTART = (Path(__file__).parents[2] / "search_spaces" / "quickstart.yaml").read_text(encoding="utf-8")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["none", "dtr", "p2", "folder", "DiT-S/2", "1e-4", 10**400, -1, 0, 0.5, [], {}, {"name": "p2"}]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(
        st.sampled_from(["name", "type", "low", "high", "values", "when"]), st.integers(), max_size=3
    ),
)
NAMES = st.sampled_from(
    ["name", "type", "when", "routing.alpha", "weighting.gamma@x", "a.b", "<<", "", "@", "1", "trial"]
)


QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def paths(values: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in nested values, the top left out."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    return [path for key, value in items for path in [(*here, key), *paths(value, (*here, key))]]


def mutate(values: Any, data: st.DataObject) -> None:
    places = paths(values)
    if not places:
        return
    *above, key = data.draw(st.sampled_from(places))
    section = values
    for part in above:
        section = section[part]
    action = data.draw(st.sampled_from(["delete", "rename", "retype", "copy"]))
    if action == "retype":
        section[key] = data.draw(VALUES)
    elif action == "copy":
        section[key] = copy.deepcopy(values if data.draw(st.booleans()) else section)
    else:
        value = section.pop(key)
        if action == "rename" and isinstance(section, dict):
            section[data.draw(NAMES | st.text(max_size=6))] = value


def check(path: Path, sets: tuple[str, ...] = ()) -> None:
    try:
        read_sweep(path, sets)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 11
        assert all(line.startswith((str(path), "--set", "and ")) for line in lines)


@pytest.mark.filterwarnings("ignore::dtr_ray.config.errors.ConfigWarning")
@QUICK
@given(st.sampled_from([QUICKSTART, GOOD]), st.integers(1, 3), st.data())
def test_a_changed_tree_gives_a_config_or_a_config_error(
    tmp_path: Path, text: str, count: int, data: st.DataObject
) -> None:
    values = parse_value(text, "test")
    for _ in range(count):
        mutate(values, data)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    check(path)
    check(path, ("weighting.name=p2", "routing.alpha=2"))


@QUICK
@given(
    st.integers(0, len(QUICKSTART)),
    st.integers(0, 12),
    st.text(max_size=6) | st.sampled_from("[]{}:,*&!|>%@`'\"\t#-?"),
)
def test_a_changed_text_gives_a_config_or_a_config_error(
    tmp_path: Path, start: int, length: int, new: str
) -> None:
    path = tmp_path / "changed.yaml"
    text = QUICKSTART[:start] + new + QUICKSTART[start + length :]
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    check(path)


@pytest.mark.filterwarnings("ignore::dtr_ray.config.errors.ConfigWarning")
@QUICK
@given(
    st.sampled_from(
        ["routing", "routing.alpha", "trial", "space", "space.routing.beta", "best", "name", "search"]
    )
    | st.text(max_size=8),
    st.text(max_size=8) | VALUES.map(repr),
)
def test_any_set_gives_a_config_or_a_config_error(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    check(path, (f"{key}={value}",))
