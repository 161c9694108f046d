"""Reads sweeps, trials and data sets from YAML; what is wrong is told with file, line, key, value and rule.

Relative paths inside a file (`data.path`, `evaluation.feature_weights`, `weighting.intervals.from`, a VAE's
folder) are taken from the current folder, as those on the command line are.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from dtr_ray.config.base import Config
from dtr_ray.config.errors import ConfigError, ConfigWarning, Problem, broken, dotted
from dtr_ray.config.explain import problems
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.config.sets import apply_sets
from dtr_ray.config.sweep import SweepConfig
from dtr_ray.config.tree import Message, Tree, fail, read_tree
from dtr_ray.config.trial import TrialConfig

AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_sweep(path: str | Path, sets: Sequence[str] = (), check_paths: bool = True) -> SweepConfig:
    """Reads a search space file.

    Args:
        path: the YAML file.
        sets: `KEY=VALUE` texts that override the file, as `apply_sets` takes them. A searched parameter that
            is set is not searched; a ConfigWarning says so.
        check_paths: whether the data and other local files that the trial names must exist.

    Raises:
        ConfigError: the file or a value is wrong; one line a problem.
    """
    tree = _read(path, sets, SweepConfig)
    config = _validated(tree, SweepConfig)
    if check_paths:
        fail([_message(tree, problem.below(("trial",))) for problem in path_problems(config.trial)])
    return config


def read_trial(path: str | Path, sets: Sequence[str] = (), check_paths: bool = True) -> TrialConfig:
    """Reads one trial's configuration: YAML, or the JSON that a trial leaves behind; else as `read_sweep`."""
    tree = _read(path, sets, TrialConfig)
    if {"trial", "space"} <= tree.values.keys():
        place = tree.origins[("trial",)]
        raise ConfigError(f"{place}: this is a sweep's file; a trial's holds what is under `trial:`")
    config = _validated(tree, TrialConfig)
    if check_paths:
        fail([_message(tree, problem) for problem in path_problems(config)])
    return config


def read_prepare(path: str | Path, sets: Sequence[str] = (), check_paths: bool = True) -> PrepareConfig:
    """Reads a data set's file for `prepare`; else as `read_sweep`."""
    tree = _read(path, sets, PrepareConfig)
    config = _validated(tree, PrepareConfig)
    if check_paths:
        fail([_message(tree, problem) for problem in prepare_path_problems(config)])
    return config


def change_trial(config: TrialConfig, sets: Sequence[str], source: str) -> TrialConfig:
    """A trial's configuration with `KEY=VALUE` texts put in; `source` says in messages where it is from."""
    tree = Tree(config.to_dict(), {(): source})
    for text in apply_sets(tree, sets, TrialConfig):
        warnings.warn(text, ConfigWarning, stacklevel=2)
    return _validated(tree, TrialConfig)


def path_problems(trial: TrialConfig) -> Iterator[Problem]:
    """The trial's local files and folders that are not there."""
    data, evaluation = trial.data, trial.evaluation
    if data.path is not None:
        yield from _missing("data.path", data.path, folder=True)
    if data.vae is not None and data.vae.startswith((".", "/", "~")):
        yield from _missing("data.vae", data.vae, folder=True)
    if evaluation.feature_weights is not None and evaluation.features == "inception":
        yield from _missing("evaluation.feature_weights", evaluation.feature_weights, folder=False)
    affinity = getattr(getattr(trial.weighting, "intervals", None), "from_", None)
    if affinity is not None:
        yield from _missing("weighting.intervals.from", affinity, folder=False)


def prepare_path_problems(config: PrepareConfig) -> Iterator[Problem]:
    """The local files and folders of a data set to prepare that are not there; the source checks its own."""
    for key, value in (("vae", config.vae), ("text_encoder", config.text_encoder)):
        if value is not None and value.startswith((".", "/", "~")):
            yield from _missing(key, value, folder=True)
    if config.feature_weights is not None:
        yield from _missing("feature_weights", config.feature_weights, folder=False)


def _missing(key: str, value: str, folder: bool) -> Iterator[Problem]:
    path = Path(value).expanduser()
    place = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
    try:
        exists, right = path.exists(), path.is_dir() if folder else path.is_file()
    except (OSError, ValueError) as error:
        yield broken(key, f"{value[:80]!r} cannot be looked up: {error}").problems[0]
        return
    if not exists:
        yield broken(key, f"{value!r} does not exist{place}").problems[0]
    elif not right:
        yield broken(key, f"{value!r} is not a {'folder' if folder else 'file'}{place}").problems[0]


def _read(path: str | Path, sets: Sequence[str], model: type[Config]) -> Tree:
    tree = read_tree(Path(path))
    for text in apply_sets(tree, sets, model):
        warnings.warn(text, ConfigWarning, stacklevel=3)
    return tree


def _validated(tree: Tree, model: type[AnyConfig]) -> AnyConfig:
    try:
        return model.from_dict(tree.values)
    except ValidationError as error:
        fail([_message(tree, problem) for problem in problems(error, model)])
        raise


def _message(tree: Tree, problem: Problem) -> Message:
    """The line for a problem, pointing at the `--set` or the written key that has most to do with it."""
    written = [path for path in (problem.path, *problem.also) if path in tree.origins]
    given = [path for path in written if tree.origins[path].startswith("--set")]
    around = tree.nearest(problem.path)
    if not written and tree.origins[around].startswith("--set"):
        given = [around]
    place = (given or written or [around])[0]
    origin, key = tree.origins[place], dotted(problem.path)
    if (place == problem.path and origin.startswith("--set")) or not key:
        return Message(0, origin, problem.rule)
    return Message(tree.lines.get(place, 0), f"{origin}: {key}", problem.rule)
