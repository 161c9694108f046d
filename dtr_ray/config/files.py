"""Reading JSON that commands leave behind: what is wrong with a file is told in one line that names it."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from pydantic import ValidationError

from dtr_ray.config.base import Config
from dtr_ray.config.errors import ConfigError, dotted, one_line
from dtr_ray.config.errors import Path as Place
from dtr_ray.config.explain import problems
from dtr_ray.disk import make_folder_durably

AnyConfig = TypeVar("AnyConfig", bound=Config)
T = TypeVar("T", dict[str, Any], list[Any])


def read_text(path: Path) -> str:
    """A file's text in UTF-8; raises ConfigError, which names the file, where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is damaged: it is not text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: str | bytes, where: str, kind: type[T]) -> T:
    """JSON that is an object (`dict`) or a list (`list`).

    Args:
        text: the JSON.
        where: the file, or file and line, that messages begin with.
        kind: what it is to be.

    Raises:
        ConfigError: it is no JSON, nested too deep, or of another kind.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where} is damaged: its JSON is nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"{where} is damaged: it is no JSON ({one_line(str(error))})") from None
    if not isinstance(found, kind):
        wanted = "an object with keys" if kind is dict else "a list"
        raise ConfigError(f"{where} is damaged: it must hold {wanted}, not {type(found).__name__}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ConfigError, which names the file, where there is none."""
    return parse_json(read_text(path), str(path), dict)


def read_config(path: Path, model: type[AnyConfig]) -> AnyConfig:
    """A configuration that was written out as JSON.

    Raises:
        ConfigError: the file cannot be read, is no JSON, or breaks a rule of `model`; names the first key.
    """
    return checked_config(read_json(path), model, str(path))


def checked_config(values: Any, model: type[AnyConfig], where: str) -> AnyConfig:
    """Validates plain values that come from `where`; raises ConfigError as `read_config`."""
    try:
        return model.from_dict(values)
    except ValidationError as error:
        found = problems(error, model)
        key: Place = found[0].path
        rule = f"{dotted(key)}: {found[0].rule}" if key else found[0].rule
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigError(one_line(f"{where} is not what this version writes: {rule}{more}")) from error


def needed(values: dict[str, Any], keys: dict[str, type | tuple[type, ...]], where: str) -> None:
    """Raises ConfigError where an object lacks one of these keys, or holds a value of another type."""
    for key, kind in keys.items():
        if key not in values:
            raise ConfigError(f"{where} is damaged: it has no {key}")
        if not isinstance(values[key], kind):
            given = type(values[key]).__name__
            raise ConfigError(f"{where} is damaged: its {key} is of another type ({given})")


def make_folder(folder: Path) -> None:
    """Makes an output folder and those above it; raises ConfigError where that cannot be."""
    try:
        make_folder_durably(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"the folder {folder} cannot be made ({reason}): give another with --output"
        ) from error


def is_inside(name: str) -> bool:
    """Whether a file's name, as a file from elsewhere tells it, stays in the folder that it is taken from."""
    path = PurePosixPath(name.replace("\\", "/"))
    leads_out = path.is_absolute() or ".." in path.parts or bool(PureWindowsPath(name).drive)
    return bool(name) and "\0" not in name and not leads_out


def inside(folder: Path, name: str, where: Path) -> Path:
    """The file `name` of a folder; raises ConfigError where `where`, which tells it, leads out of there."""
    if not is_inside(name):
        raise ConfigError(f"{where}: {name!r} leads out of {folder}; refused")
    return folder / name
