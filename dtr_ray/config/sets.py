"""`--set KEY=VALUE`: changes to a file's values before they are validated."""

from collections.abc import Sequence
from typing import Any

from dtr_ray.config.base import Config
from dtr_ray.config.errors import ConfigError, Path, dotted, one_line, shown, suggestion
from dtr_ray.config.fields import dotted_names, fields, sections
from dtr_ray.config.space import target, wanted_values
from dtr_ray.config.tree import MAX_MESSAGES, Tree, parse_value
from dtr_ray.config.trial import TrialConfig


def apply_sets(tree: Tree, sets: Sequence[str], model: type[Config]) -> list[str]:
    """Puts `KEY=VALUE` texts into the values of a file for `model`, in place; returns warnings.

    A key is dotted, from the file's top or, in a sweep, from the trial (`routing.alpha` is
    `trial.routing.alpha`); a value is YAML. A new `name` of a section drops the section's other values. A
    searched parameter that is set is no longer searched.

    Raises ConfigError, one line for each text that is wrong.
    """
    changes: list[tuple[str, Path, Any]] = []
    errors: list[str] = []
    for text in sets:
        try:
            changes.append(_change(text, model, tree.values))
        except ConfigError as error:
            errors.append(one_line(str(error)))
    warnings: list[str] = []
    # Names first, so that a parameter given beside its name is kept.
    for text, path, value in sorted(changes, key=lambda change: (change[1][-1] != "name", len(change[1]))):
        _put(tree, path, value, f"--set {text}", model)
        if path[0] == "trial" and len(path) > 1 and isinstance(tree.values.get("space"), dict):
            warnings += _fix(tree.values, path[1:], value)
            if not tree.values["space"]:
                errors.append(one_line(f"--set {text}: leaves no parameter to search"))
    if errors:
        raise ConfigError("\n".join(errors[:MAX_MESSAGES]))
    return warnings


def _change(text: str, model: type[Config], values: dict[str, Any]) -> tuple[str, Path, Any]:
    """(text, path, value) of one `KEY=VALUE`."""
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as routing.alpha=4")
    value = parse_value(written, f"--set {text}")
    path = _path(key, model, values)
    if path is None:
        raise ConfigError(f"--set {text}: unknown key; {_hint(key, model, values)}")
    inside = _below(model, path)
    if inside and not isinstance(value, dict):
        given = ", ".join(f"{key}.{name}" for name in inside)
        raise ConfigError(f"--set {text}: {key} is a whole section; set one of its values: {given}")
    return text, path, value


def _path(key: str, model: type[Config], values: dict[str, Any]) -> Path | None:
    head, _, rest = key.partition(".")
    if "space" in model.model_fields:
        trial = sections(model)["trial"][""]
        if head in sections(trial):
            return _path(f"trial.{key}", model, values)
        if head == "best" and rest in dotted_names(trial):
            return head, rest
        if head == "space":
            return _space_path(rest, values.get("space"))
    names = dotted_names(model)
    known = key in names or any(name.startswith(f"{key}.") for name in names)
    return tuple(key.split(".")) if known else None


def _space_path(rest: str, space: object) -> Path | None:
    """`routing.alpha.low`: a key of the space, and perhaps a key inside."""
    for key in space if isinstance(space, dict) else ():
        if rest == key:
            return "space", key
        if rest.startswith(f"{key}.") and "." not in rest[len(key) + 1 :]:
            return "space", key, rest[len(key) + 1 :]
    return None


def _hint(key: str, model: type[Config], values: dict[str, Any]) -> str:
    names = list(dotted_names(model))
    head = key.partition(".")[0]
    if head in ("space", "best") and head in model.model_fields:
        space = values.get("space")
        known = list(space if isinstance(space, dict) else ())
        names = [f"{head}.{name}" for name in (known if head == "space" else _trial_names(names))]
    elif head != "trial":
        names = [*_trial_names(names), *(name for name in names if not name.startswith("trial."))]
    return suggestion(key, names)


def _trial_names(names: list[str]) -> list[str]:
    return [name.removeprefix("trial.") for name in names if name.startswith("trial.")]


def _below(model: type[Config], path: Path) -> list[str]:
    start = f"{dotted(path)}."
    return [name.removeprefix(start) for name in dotted_names(model) if name.startswith(start)]


def _put(tree: Tree, path: Path, value: Any, origin: str, model: type[Config]) -> None:
    """Writes the value; a section on the way that is not one is left to the validation to complain about."""
    section, here = tree.values, model
    for depth, part in enumerate(path[:-1], 1):
        options = sections(here).get(str(part), {})
        if section.get(part) is None:
            # What the file leaves out begins as the default's variant, or `alpha` would have no `name`.
            section[part] = {"name": fields(here)[str(part)].default.name} if len(options) > 1 else {}
            tree.origins[path[:depth]] = origin
        section = section[part]
        if not isinstance(section, dict):
            return
        here = options.get("") or options.get(str(section.get("name")), Config)
    if path[-1] == "name" and len(path) > 1 and section.get("name") != value:
        section.clear()
        _forget(tree, path[:-1])
    _forget(tree, path)
    section[path[-1]] = value
    tree.origins[path] = origin


def _forget(tree: Tree, path: Path) -> None:
    for known in [p for p in tree.origins if p[: len(path)] == path and p != path]:
        del tree.origins[known]


def _fix(values: dict[str, Any], path: Path, value: Any) -> list[str]:
    """Takes what was set at `path` of the trial out of the space, and what cannot exist any more with it."""
    space, name = values["space"], dotted(path)
    fixed = {name: value}
    if isinstance(value, dict):
        fixed = {f"{name}.{key}": v for key, v in value.items()}
    gone = {key: "is set" for key in space if target(str(key)) in fixed or str(key).startswith(f"{name}.")}
    gone |= {key: f"does not exist under {name} = {shown(value)}" for key in _without(space, path, value)}
    for key, parameter in space.items():
        when: Any = parameter.get("when") if isinstance(parameter, dict) else None
        for other in [n for n in when if n in fixed] if isinstance(when, dict) else []:
            if fixed[other] in wanted_values(when[other]):
                del when[other]
            else:
                gone[key] = f"does not exist under {other} = {shown(fixed[other])}"
    for key in gone:
        del space[key]
    left = {target(str(key)) for key in space}
    search = values.get("search")
    points = search.get("starting_points") if isinstance(search, dict) else None
    for point in points if isinstance(points, list) else []:
        for key in [target(str(k)) for k in gone] if isinstance(point, dict) else []:
            if key not in left:
                point.pop(key, None)
    return [f"{key} {reason}: it is not searched" for key, reason in gone.items()]


def _without(space: dict[str, Any], path: Path, value: object) -> list[str]:
    """Keys of the space that the variant of a section, chosen by its name, does not know."""
    if path[-1] != "name" or len(path) != 2:
        return []
    options = sections(TrialConfig).get(str(path[0]), {})
    if not isinstance(value, str) or value not in options:
        return []
    inside = [key for key in space if str(key).startswith(f"{path[0]}.")]
    return [key for key in inside if target(key).split(".")[1] not in fields(options[value])]
