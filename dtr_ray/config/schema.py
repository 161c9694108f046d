"""`python -m dtr_ray.config.schema`: JSON schemas by which editors complete and check the YAML files."""

import argparse
import json
from pathlib import Path
from typing import Any

from dtr_ray.config.base import Config
from dtr_ray.config.fields import fields, sections
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.config.presets import PRESETS, SIZES
from dtr_ray.config.sweep import SweepConfig
from dtr_ray.config.trial import TrialConfig

MODELS: dict[str, type[Config]] = {"sweep": SweepConfig, "trial": TrialConfig, "prepare": PrepareConfig}
"""Schemas by the first part of their file's name."""


def schema(model: type[Config]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a sweep's, a trial's or a data set's file."""
    result = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    if model is PrepareConfig:
        return result
    result["$defs"]["ModelConfig"]["properties"]["name"]["enum"] = [*SIZES, *PRESETS]
    if model is SweepConfig:
        properties = result["properties"]
        result["$defs"]["Parameter"] = properties["space"].pop("additionalProperties")
        ranges = {"$ref": "#/$defs/Parameter"}
        names = "|".join(_descriptions()).replace(".", r"\.")
        properties["space"] |= {
            "properties": {name: {"description": said, **ranges} for name, said in _descriptions().items()},
            "patternProperties": {f"^({names})@[A-Za-z0-9_-]+$": ranges},
            "additionalProperties": False,
        }
        properties["best"] |= {
            "properties": {name: {"description": said} for name, said in _descriptions().items()},
            "additionalProperties": False,
        }
    return result


def _descriptions() -> dict[str, str]:
    """The docstring (or the section's) of each value of a trial, by dotted name."""
    return _described(TrialConfig)


def _described(model: type[Config]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, field in fields(model).items():
        below = sections(model).get(key)
        if below is None:
            said = field.description or model.__doc__
            assert said is not None
            texts[key] = said
        for variant in (below or {}).values():
            for name, said in _described(variant).items():
                texts.setdefault(f"{key}.{name}", said)
    return texts


def text(model: type[Config]) -> str:
    """A schema as its file holds it."""
    return json.dumps(schema(model), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Writes `sweep.schema.json`, `trial.schema.json` and `prepare.schema.json`."""
    parser = argparse.ArgumentParser(prog="python -m dtr_ray.config.schema", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("search_spaces/schema"), help="where to")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        (folder / f"{name}.schema.json").write_text(text(model), encoding="utf-8")


if __name__ == "__main__":
    main()
