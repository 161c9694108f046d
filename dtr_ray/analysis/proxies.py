"""What a proxy is worth: a sweep's own checkpoints, measured by `evaluation.proxy` and in full.

Every checkpoint that the trials have kept is measured both ways. What early stopping relies on is the order
of trials at one training step, so ranks are compared step by step; over all steps together they agree more,
since whoever has trained for longer is better by either figure.
"""

import csv
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dtr_ray.analysis.ranks import Correlation, kendall, kept, spearman
from dtr_ray.cache import cache_dir
from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.files import read_config
from dtr_ray.config.protocol import protocol_of
from dtr_ray.config.read import change_trial
from dtr_ray.data import ImageData, load_images
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.export.trained import open_model
from dtr_ray.training.checksums import MANIFEST_FILE
from dtr_ray.training.state import CONFIG_FILE

CSV_FILE = "proxy.csv"
_MIN_TRIALS = 3


@dataclass(frozen=True)
class Measured:
    """One checkpoint, both ways."""

    trial: str
    step: int
    checkpoint: str
    """Hash of its manifest."""
    proxy: float
    proxy_stderr: float | None
    proxy_seconds: float
    full: float
    full_stderr: float | None
    full_seconds: float


@dataclass(frozen=True)
class Agreement:
    """How far the two figures agree on the order of some checkpoints."""

    step: int | None
    """Training step of all of them; None for all steps together."""
    count: int
    spearman: Correlation
    kendall: Correlation
    kept: int
    """Of the better half by the full metric, how many the proxy's better half holds."""


@dataclass(frozen=True)
class ProxyStudy:
    """All that was measured."""

    metric: str
    proxy_metric: str
    protocols: tuple[dict[str, Any], dict[str, Any]]
    """Of the full metric and of the proxy."""
    measured: list[Measured]
    partial: Path
    """Keeps what has been measured, so that an interrupted study goes on."""

    @property
    def agreements(self) -> list[Agreement]:
        """For each training step of at least three trials, then for all together if there are more steps."""
        steps = sorted({each.step for each in self.measured})
        groups: list[tuple[int | None, list[Measured]]] = [
            (step, [each for each in self.measured if each.step == step]) for step in steps
        ]
        groups += [(None, self.measured)] if len(steps) > 1 else []
        return [agreement(step, group) for step, group in groups if len(group) >= _MIN_TRIALS]

    @property
    def seconds(self) -> tuple[float, float]:
        """Of all full evaluations and of all of the proxy."""
        return sum(m.full_seconds for m in self.measured), sum(m.proxy_seconds for m in self.measured)


def agreement(step: int | None, group: Sequence[Measured]) -> Agreement:
    """How far the two figures agree on the order of at least three checkpoints."""
    proxies, fulls = [each.proxy for each in group], [each.full for each in group]
    half = kept(proxies, fulls, len(group) // 2)
    return Agreement(step, len(group), spearman(proxies, fulls), kendall(proxies, fulls), half)


def study_proxy(
    folder: Path, sets: Sequence[str] = (), tell: Callable[[int, int], None] = lambda done, total: None
) -> ProxyStudy:
    """Measures the checkpoints that a sweep has kept, those of its trials' best and newest reports.

    Args:
        folder: the sweep's, finished or running.
        sets: `KEY=VALUE` changes of the trials, such as `evaluation.proxy.num_samples=1000`.
        tell: told of (checkpoints done, all of them).

    Raises:
        ValueError: there is no sweep, no proxy, or no checkpoint.
    """
    base = _changed(_sweep(folder).trial, sets, str(folder))
    data = load_images(base.data, cache_dir())
    protocols = protocol_of(base, data.identity), protocol_of(base, data.identity, proxy=True)
    key = hashlib.sha256(json.dumps(protocols, sort_keys=True).encode()).hexdigest()[:12]
    partial = folder / "proxy" / f"{key}.jsonl"
    known = {(m.trial, m.step, m.checkpoint): m for m in _read(partial)}
    found = []
    checkpoints = _checkpoints(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for number, (trial, path) in enumerate(checkpoints):
        tell(number, len(checkpoints))
        digest = hashlib.sha256((path / MANIFEST_FILE).read_bytes()).hexdigest()[:16]
        place = trial, int(path.name), digest
        if place not in known:
            known[place] = _measure(place, path, sets, data, device)
            _append(partial, known[place])
        found.append(known[place])
    tell(len(checkpoints), len(checkpoints))
    assert base.evaluation.proxy_metric is not None
    return ProxyStudy(base.evaluation.metric, base.evaluation.proxy_metric, protocols, found, partial)


def write_study(study: ProxyStudy, path: Path) -> None:
    """Writes a CSV, one row a checkpoint, with every digit."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in study.measured)
    temporary.replace(path)


def _sweep(folder: Path) -> SweepConfig:
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a sweep: it has no sweep.json")
    return read_config(path, SweepConfig)


def _changed(trial: TrialConfig, sets: Sequence[str], source: str) -> TrialConfig:
    """The trial with the changes; raises ValueError where it has no proxy then."""
    own = [text for text in sets if text.startswith("evaluation.proxy.")]
    if trial.evaluation.proxy is None and not own:
        raise ValueError(
            f"{source} has no evaluation.proxy: give one, such as --set evaluation.proxy.num_samples=1000"
        )
    given = trial.evaluation.proxy or any(text.startswith("evaluation.proxy.until_step=") for text in own)
    # Up to which step a proxy is used is nothing that is measured here.
    return change_trial(trial, [*sets, *([] if given else ["evaluation.proxy.until_step=1"])], source)


def _checkpoints(folder: Path) -> list[tuple[str, Path]]:
    """(trial, checkpoint's folder) of all whole checkpoints that are there."""
    found = sorted((folder / "trials").glob(f"*/checkpoints/[0-9]*/{MANIFEST_FILE}"))
    if not found:
        raise ValueError(f"{folder}: no trial has kept a checkpoint")
    return [(path.parents[2].name, path.parent) for path in found]


def _measure(
    place: tuple[str, int, str], path: Path, sets: Sequence[str], data: ImageData, device: torch.device
) -> Measured:
    trained = open_model(path, device)
    config = _changed(TrialConfig.load(path / CONFIG_FILE), sets, str(path))
    evaluator = Evaluator(config, data, Group(), device)
    figures: list[Any] = []
    for proxy, name in ((True, config.evaluation.proxy_metric), (False, config.evaluation.metric)):
        assert name is not None
        started = time.perf_counter()
        metrics = evaluator.evaluate(trained.model, proxy=proxy).metrics
        figures += [metrics[name], metrics.get(f"{name}_stderr"), round(time.perf_counter() - started, 3)]
    return Measured(*place, *figures)


def _read(path: Path) -> list[Measured]:
    """What was measured before; a last line torn by a crash counts as never written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [Measured(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def _append(path: Path, measured: Measured) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(asdict(each)) + "\n" for each in (*_read(path), measured)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
