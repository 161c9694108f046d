"""The keys that a configuration class knows, read off its annotations: for messages and `--set`."""

import types
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dtr_ray.config.base import Config
from dtr_ray.config.errors import Path


def fields(model: type[Config]) -> dict[str, FieldInfo]:
    """The fields of a section by the keys of the YAML, which differ from Python's names for `from`."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def variants(annotation: Any) -> dict[str, type[Config]]:
    """The sections that an annotation allows: `{"": Section}`, or one for each `name` (`type`); else {}."""
    annotation = unwrapped(annotation)
    members = [annotation] if isinstance(annotation, type) else [unwrapped(a) for a in get_args(annotation)]
    models = [m for m in members if isinstance(m, type) and issubclass(m, Config)]
    if not models or len(models) < len(members) or get_origin(annotation) is dict:
        return {}
    if len(models) == 1:
        return {"": models[0]}
    return {str(get_args(m.model_fields[discriminator(models)].annotation)[0]): m for m in models}


def discriminator(models: list[type[Config]]) -> str:
    """The key by which one of several sections is chosen."""
    return "type" if all("type" in m.model_fields for m in models) else "name"


def unwrapped(annotation: Any) -> Any:
    """An annotation without `Annotated` and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        if len(members) == 1:
            return unwrapped(members[0])
    return annotation


@cache
def sections(model: type[Config]) -> dict[str, dict[str, type[Config]]]:
    """The sections directly below `model`: key to its variants."""
    found = {name: variants(field.annotation) for name, field in fields(model).items()}
    return {name: models for name, models in found.items() if models}


@cache
def dotted_names(model: type[Config]) -> tuple[str, ...]:
    """Dotted names of all values, those of every variant of a section (`routing.alpha`, ...) among them."""
    names: dict[str, None] = {}
    for key in fields(model):
        below = sections(model).get(key)
        if below is None:
            names[key] = None
        else:
            for variant in below.values():
                names.update({f"{key}.{name}": None for name in dotted_names(variant)})
    return tuple(names)


class Place(NamedTuple):
    """Where a location of pydantic's is in the tree, and what the classes know about it."""

    path: Path
    annotation: Any
    """The annotation there; None where the key is unknown."""
    options: dict[str, type[Config]]
    """The variants of the section that holds the key."""
    tag: str
    """The variant that was chosen, "" where there is no choice."""

    @property
    def siblings(self) -> list[str]:
        """The keys that the section knows."""
        return list(fields(self.options[self.tag])) if self.tag in self.options else []


def locate(model: type[Config], loc: tuple[str | int, ...]) -> Place:
    """The place of pydantic's location, which holds the tags of sections and the members of unions too."""
    annotation: Any = model
    path: list[str | int] = []
    holder: dict[str, type[Config]] = {}
    tag = ""
    parts = list(loc)
    while parts:
        options = variants(annotation)
        part = parts.pop(0)
        if len(options) > 1:
            if not parts:
                break
            tag, holder, part = str(part), options, parts.pop(0)
        elif options:
            tag, holder = "", options
        elif part != "[key]" and get_origin(unwrapped(annotation)) in (dict, list):
            tag, holder = "", {}
        else:
            break
        if tag in holder:
            field = fields(holder[tag]).get(str(part))
            annotation = None if field is None else field.annotation
        else:
            annotation = get_args(unwrapped(annotation))[-1]
        path.append(part)
    return Place(tuple(path), annotation, holder, tag)


def literals(annotation: Any) -> list[str]:
    """The words of a `Literal`, else []."""
    annotation = unwrapped(annotation)
    return [str(word) for word in get_args(annotation)] if get_origin(annotation) is Literal else []
