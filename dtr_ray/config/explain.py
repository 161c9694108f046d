"""From pydantic's errors to problems in plain words, each at its place in the tree."""

import re
from typing import Any

from pydantic import ValidationError

from dtr_ray.config.base import Config
from dtr_ray.config.errors import Path, Problem, RuleError, dotted, near_miss, shown, suggestion
from dtr_ray.config.fields import (
    Place,
    discriminator,
    dotted_names,
    fields,
    literals,
    locate,
    sections,
    variants,
)

_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
}
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def problems(error: ValidationError, model: type[Config]) -> list[Problem]:
    """All problems of an invalid `model`, one for each place."""
    found: dict[Path, list[Problem]] = {}
    wrong_keys: set[Path] = set()
    plain: Path | None = None
    for detail in error.errors(include_url=False):
        place = locate(model, detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if detail["loc"] and detail["loc"][-1] == "[key]":
            wrong_keys.add(place.path)
        if isinstance(cause, RuleError):
            for problem in cause.problems:
                found.setdefault(place.path + problem.path, []).append(problem.below(place.path))
            continue
        path = place.path
        if detail["type"] == "union_tag_invalid":
            path += (discriminator(list(variants(place.annotation).values())),)
        # The members of a union of plain types complain one by one about the same value: the first is enough,
        # unless one has the right type and another complaint.
        if path not in found or (path == plain and detail["type"] not in _TYPES):
            found[path] = [Problem(path, _rule(dict(detail), place, model))]
            plain = path if detail["loc"][-1:] == ("bool",) else None
    return [
        problem
        for path, listed in found.items()
        if not any(path[: len(wrong)] == wrong and path != wrong for wrong in wrong_keys)
        for problem in listed
    ]


def _rule(detail: dict[str, Any], place: Place, model: type[Config]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(place, model)
    if kind == "missing":
        return "is missing: it has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(place.annotation, value)
    if kind == "literal_error":
        words = literals(place.annotation)
        return f"{shown(value)} is not one of {', '.join(words)}{_guess(value, words)}"
    if kind in _LIMITS:
        word, limit = _LIMITS[kind]
        return f"must be {word} {shown(context[limit])}, got {shown(value)}"
    if kind == "string_pattern_mismatch":
        rule = "must begin with a letter or digit, then letters, digits, '.', '_' or '-', 100 at most"
        return f"{rule}; got {shown(value)}"
    if kind == "too_short":
        return "is empty: it needs at least one entry"
    if kind == "string_too_short":
        return "is an empty text: leave the key out instead"
    if kind == "too_long":
        return f"has {context['actual_length']} entries; at most {context['max_length']} are allowed"
    if kind in _TYPES:
        # The first member of a union of plain types, `bool | int | float | str`.
        plain = detail["loc"][-1:] == ("bool",)
        return _wrong_type("a number, text, true or false" if plain else _TYPES[kind], value)
    # Validators of ours have plain words already; pydantic's rarer ones nearly.
    return str(context.get("error") or detail["msg"]).replace("Input should be", "must be")


def _guess(value: object, names: list[str]) -> str:
    guess = near_miss(value, names) if isinstance(value, str) else None
    return f"; did you mean {guess}?" if guess else ""


def _wrong_type(expected: str, value: object) -> str:
    if value is None:
        return f"expected {expected}, got nothing"
    kinds = {int: "the number ", float: "the number ", str: "the text ", list: "the list "}
    text = str(value) if isinstance(value, float) else shown(value)
    return f"expected {expected}, got {kinds.get(type(value), '')}{text}{_hint(expected, value)}"


def _hint(expected: str, value: object) -> str:
    if expected == "text" and isinstance(value, bool | int | float):
        return f": put it in quotes, '{shown(value)}'"
    if expected == "a whole number" and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if expected == "true or false" and str(value).lower() in _BOOLEANS:
        return f": write {_BOOLEANS[str(value).lower()]}"
    if expected in ("a number", "a whole number") and isinstance(value, str):
        plain = re.sub(r"(?<=\d)[_, ](?=\d)", "", value.strip())
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", plain):
            return ": remove the quotes" if plain == value else f": write {plain}"
    return ""


def _wrong_tag(annotation: Any, value: object) -> str:
    options = variants(annotation)
    key = discriminator(list(options.values()))
    tag = value.get(key) if isinstance(value, dict) else None
    if tag is None:
        return f"has no {key}: one of {', '.join(options)}"
    return f"{shown(tag)} is not one of {', '.join(options)}{_guess(tag, list(options))}"


def _is_chosen(model: type[Config], name: str) -> bool:
    """Whether a value, by its dotted name, is in a section that has several variants."""
    section = {"": model}
    for part in name.split(".")[:-1]:
        section = sections(section[""])[part]
        if len(section) > 1:
            return True
    return False


def _unknown_key(place: Place, model: type[Config]) -> str:
    word = place.path[-1]
    others = [tag for tag, variant in place.options.items() if word in fields(variant)]
    if others:
        key = discriminator(list(place.options.values()))
        return f"does not exist under {key}: {place.tag}, only under {' and '.join(others)}"
    if word == "<<":
        return "merge keys (<<) are not supported: write the values out"
    guess = near_miss(word, place.siblings)
    parts = f".{dotted(place.path[-1:])}"
    places = [name for name in dotted_names(model) if name.endswith(parts) or f"{parts}." in name]
    # A key that a section always has is likelier meant than one that exists under some choice alone.
    places.sort(key=lambda name: _is_chosen(model, name))
    if places:
        elsewhere = dict.fromkeys(name[: f"{name}.".index(f"{parts}.") + len(parts)] for name in places)
        return f"unknown key here; did you mean {' or '.join([*([guess] if guess else []), *elsewhere][:3])}?"
    return f"unknown key; {suggestion(word, place.siblings)}"
