"""The JSON schemas that editors use."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.schema import MODELS, main, schema, text
from dtr_ray.config.tree import parse_value, read_tree

FOLDER = Path(__file__).parents[2] / "search_spaces"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_shipped_schema_is_current(name: str) -> None:
    shipped = (FOLDER / "schema" / f"{name}.schema.json").read_text(encoding="utf-8")
    assert shipped == text(MODELS[name]), "run python -m dtr_ray.config.schema"


def test_the_command_writes_one_for_each_kind_of_file(tmp_path: Path) -> None:
    main([str(tmp_path / "new")])
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {f"{kind}.schema.json" for kind in ("sweep", "trial", "prepare")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_name_the_schema_and_follow_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema/sweep.schema.json"
    jsonschema.Draft202012Validator(schema(SweepConfig)).validate(read_tree(path).values)


def test_the_schemas_are_schemas_and_the_defaults_follow_them() -> None:
    for model in MODELS.values():
        jsonschema.Draft202012Validator.check_schema(schema(model))
    jsonschema.validate(TrialConfig().to_dict(), schema(TrialConfig))


def test_every_value_has_a_place_in_the_space_with_a_description() -> None:
    properties = schema(SweepConfig)["properties"]["space"]["properties"]
    assert {"routing.alpha", "weighting.gamma", "training.lr"} <= properties.keys()
    assert all(entry["description"] for entry in properties.values())


@pytest.mark.parametrize(
    "wrong",
    [
        "{name: x, trial: {}, space: {routing.alhpa: {type: uniform, low: 1, high: 2}}}",
        "{name: x, trial: {}, space: {routing.alpha: {type: uniform, low: 1}}}",
        "{name: x, trial: {routing: {name: dtr, beta: 0}}, space: {}}",
        "{name: x, trial: {model: {name: DiT-B/3}}, space: {}}",
        "{name: x, trial: {}, space: {routing.alpha: {type: int, low: 1, high: 2}}, best: {training.x: 1}}",
        "{name: x, trail: {}, space: {routing.alpha: {type: uniform, low: 1, high: 2}}}",
    ],
)
def test_the_schema_refuses_what_is_wrong(wrong: str) -> None:
    values: Any = parse_value(wrong, "test")
    assert not jsonschema.Draft202012Validator(schema(SweepConfig)).is_valid(values)
    assert json.dumps(values)
