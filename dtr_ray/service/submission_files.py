"""What a submitted sweep takes along: the code, its resolved file, and the files that it names.

Nothing else of the current folder goes. What is sent is shown in Ray's dashboard to all who may see it, so
nothing secret may be in it.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import dtr_ray
from dtr_ray.config import SweepConfig
from dtr_ray.search.checks import check_trials
from dtr_ray.search.database import PASSWORD, without_password

MAX_BYTES = 90 * 2**20
"""Ray's dashboard takes 100 MiB."""
# Whose value means the same on the cluster; a path of this machine, such as DTR_RAY_CACHE, does not.
_PASSED = ("DTR_RAY_MIRROR", "DTR_RAY_OFFLINE", "HF_HUB_OFFLINE")
_TRACKING = "MLFLOW_TRACKING_URI"
_LOOPBACK = re.compile(r"^https?://(localhost|127\.[\d.]+|\[::1\])(?=[:/]|$)")
_FOLDERS = ("path", "vae", "text_encoder")


@dataclass(frozen=True)
class Shipment:
    """A folder that is ready to be sent."""

    folder: Path
    file: str
    """Name of the sweep's file in it."""
    num_files: int
    num_bytes: int


def check_shippable(config: SweepConfig) -> None:
    """Checks all that can be known here of a sweep that is to run elsewhere.

    An absolute path is the cluster's, and is checked there.

    Raises:
        ValueError: results would vanish with the job; a password would be shown; a path is not sent along.
    """
    output = config.storage.output
    if "://" not in output and not Path(output).is_absolute():
        raise ValueError(
            f"storage.output is {output!r}, which would be in the job's own folder and vanish with it: give "
            "an absolute path that all machines of the cluster share (--output /mnt/shared/runs), or a URL"
        )
    for key, value in _texts(config.to_dict()):
        if without_password(value) != value and ("://" in value or key in ("storage.study", "tracking.uri")):
            raise ValueError(
                f"{key} holds a password, and what is submitted is shown in Ray's dashboard: leave it out "
                f"({without_password(value)}) and set it in the cluster's environment ({_variables(key)})"
            )
    for name in _FOLDERS:
        path = getattr(config.trial.data, name)
        if path is not None and _is_path(name, path) and not _is_elsewhere(path):
            raise ValueError(
                f"trial.data.{name} is {path!r}: data is not sent along; give the absolute path that it has "
                "on the cluster"
            )
    for key, value in _needed_files(config):
        if not _is_file(value):
            raise ValueError(f"{key}: {value!r} does not exist (seen from {Path.cwd()})")
    for key, value in _named_files(config):
        if ".." in Path(value).parts:
            raise ValueError(
                f"{key}: {value!r} is not in the current folder, and only what is in it can be sent: give "
                "the absolute path that it has on the cluster"
            )
    if not any("from" in key.split(".") and _is_elsewhere(v) for key, v in _texts(config.to_dict())):
        check_trials(config)


def pack(config: SweepConfig, folder: Path) -> Shipment:
    """Copies what the sweep needs into `folder`, which is empty.

    Raises:
        ValueError: it is more than can be sent.
    """
    package = Path(dtr_ray.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]"))
    for value in sorted({value for _, value in _named_files(config)}):
        (folder / value).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(value, folder / value)
    name = f"{config.name}.resolved.yaml"
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    (folder / name).write_text(text, encoding="utf-8")
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ValueError(
            f"the files are {total / 2**20:.0f} MiB, and at most {MAX_BYTES / 2**20:.0f} can be sent: "
            f"put {largest.relative_to(folder)} ({sizes[largest] / 2**20:.0f} MiB) on the cluster, and give "
            "the absolute path that it has there"
        )
    return Shipment(folder, name, len(sizes), total)


def job_environment(config: SweepConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the job gets: those of here that mean the same there, and hold no password."""
    found = {name: environment[name] for name in _PASSED if environment.get(name)}
    if config.tracking.uri is None and _is_remote(environment.get(_TRACKING, "")):
        found[_TRACKING] = environment[_TRACKING]
    return {name: value for name, value in found.items() if without_password(value) == value}


def not_sent(config: SweepConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each variable that is set here, decides about this sweep, and does not go along."""
    tracking = environment.get(_TRACKING, "")
    if config.tracking.uri is None and tracking:
        if without_password(tracking) != tracking:
            yield f"{_TRACKING} holds a password and is not sent: set it in the cluster's environment"
        elif not _is_remote(tracking):
            yield f"{_TRACKING} is not sent: {tracking} means another place on the cluster"
    if config.storage.study is not None and environment.get(PASSWORD):
        yield f"{PASSWORD} is not sent: set it in the cluster's environment"


def _variables(key: str) -> str:
    if key == "tracking.uri":
        return "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
    return PASSWORD if key == "storage.study" else "as its library reads it"


def _is_remote(uri: str) -> bool:
    return uri.startswith(("http://", "https://")) and not _LOOPBACK.match(uri)


def _is_elsewhere(value: str) -> bool:
    """Whether it is the cluster's to find: an absolute path, one of a home folder, a URL."""
    return value.startswith(("/", "~")) or "://" in value


def _is_path(name: str, value: str) -> bool:
    """All but the data itself may be names of the Hugging Face hub."""
    return name == "path" or value.startswith((".", "/", "~"))


def _needed_files(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """Keys and relative paths of the files that every trial reads."""
    trial = config.trial
    found = {
        "trial.weighting.intervals.from": getattr(getattr(trial.weighting, "intervals", None), "from_", None)
    }
    if trial.evaluation.features == "inception":
        found["trial.evaluation.feature_weights"] = trial.evaluation.feature_weights
    yield from (
        (key, value) for key, value in found.items() if value is not None and not _is_elsewhere(value)
    )


def _named_files(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """All values, those of the space and of `best` too, that are the relative path of a file here."""
    for key, value in _texts(config.to_dict()):
        looks_so = os.sep in value or Path(value).suffix
        if looks_so and not _is_elsewhere(value) and _is_file(value):
            yield key, value


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):
        # Too long, or no path at all.
        return False


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a tree, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
