"""The base of every configuration object: frozen, strict, and closed to unknown keys."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Config(BaseModel):
    """A frozen configuration object; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        # `from` is a key of the YAML and a keyword of Python.
        serialize_by_alias=True,
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validates plain values, as they come from YAML or JSON."""
        return cls.model_validate(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes back; every default is written out."""
        return self.model_dump(mode="json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one level with dotted names: `{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _names_first(change: tuple[str, Any]) -> tuple[bool, int]:
    dotted, _ = change
    return not dotted.endswith(".name"), dotted.count(".")


def override(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested `values` with dotted `changes` put in; the originals stay as they are.

    A change of a section's `name` (of `routing`, `weighting`, ...) drops that section's other
    values, since they belong to the choice before: the new choice starts from its own defaults.
    """
    copy = {k: override(v, {}) if isinstance(v, dict) else v for k, v in values.items()}
    # Names first, so that a parameter given beside its name is kept.
    for dotted, value in sorted(changes.items(), key=_names_first):
        *path, key = dotted.split(".")
        section = copy
        for part in path:
            child = section.get(part)
            section[part] = child if isinstance(child, dict) else {}
            section = section[part]
        if key == "name" and path and section.get("name") != value:
            section.clear()
        section[key] = value
    return copy
