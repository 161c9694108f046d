"""Comparing the methods of sweeps over seeds: trials that differ in `training.seed` alone are one row.

Reads the journals alone, so that a sweep can be looked at while it runs. Figures of different protocols
(dtr_ray.config.protocol) never share a table.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtr_ray.config import SweepConfig
from dtr_ray.config.errors import shown, suggestion
from dtr_ray.config.files import read_config
from dtr_ray.config.protocol import Protocol, describe, differences, groups
from dtr_ray.config.space import Scalar, target
from dtr_ray.search.journal import TrialRecord, read_events, replay
from dtr_ray.search.names import describe_params, short_names

SEED = "training.seed"
SWEEP = "sweep"
"""Heading of the sweep that a trial is of, where there are several."""
# All others are distances, losses and times; the names may go on with a number of samples.
_HIGHER_IS_BETTER = ("is_", "precision_", "recall_")


@dataclass(frozen=True)
class Difference:
    """How far a row is above the baseline: seed by seed, where they share any."""

    mean: float
    error: float | None
    """Standard error; None where a single pair of values gives none."""
    num_pairs: int
    """Seeds that both have; 0 where the means of different seeds are compared."""


@dataclass
class Row:
    """Trials that differ in their seed alone."""

    params: dict[str, Any]
    """What was searched, the seed apart."""
    values: dict[Any, list[float]] = field(default_factory=dict)
    """The metric of completed trials by their seed (None where no seed is searched)."""
    statuses: Counter[str] = field(default_factory=Counter)
    difference: Difference | None = None

    @property
    def all_values(self) -> list[float]:
        """Of all seeds."""
        return [value for values in self.values.values() for value in values]

    @property
    def mean(self) -> float | None:
        """None before a trial is completed."""
        return statistics.fmean(self.all_values) if self.values else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean, None below two values."""
        return _standard_error(self.all_values)


@dataclass(frozen=True)
class Comparison:
    """A sweep's rows, the best first, and what they are compared in."""

    metric: str
    at: str
    rows: list[Row]
    baseline: Row | None
    names: dict[str, str]
    """Headings of the searched parameters by dotted name, the seed apart."""
    protocol: Protocol
    """What the values measure; empty in records from before that was kept."""


def compare_trials(
    folder: Path, metric: str | None = None, baseline: dict[str, Scalar] | None = None, at: str = "best"
) -> Comparison:
    """The one table of `compare_sweeps` for one sweep."""
    return compare_sweeps([folder], metric, baseline, at)[0]


def compare_sweeps(
    folders: Sequence[Path],
    metric: str | None = None,
    baseline: dict[str, Scalar] | None = None,
    at: str = "best",
    *,
    mixed: bool = False,
) -> list[Comparison]:
    """Groups the trials of sweeps, finished or running; in several sweeps, each by itself.

    Only completed trials count: those stopped early have trained for less.

    Args:
        folders: the sweeps'.
        metric: one that the trials report; default: what each sweep minimises.
        baseline: searched parameters (and `sweep`) by dotted name, that fit one row alone; None compares
            with none.
        at: `best`, each trial's best value, by which the sweep ranks; or `last`, that of its last step.
        mixed: make one table for each protocol, instead of refusing figures of several.

    Raises:
        ValueError: there is no sweep, no such metric, not one such row, or more than one protocol.
    """
    found = [_read(folder, metric, several=len(folders) > 1) for folder in folders]
    records = [each for sweep in found for each in sweep.records]
    names = short_names(dict.fromkeys(key for sweep in found for key in sweep.names))
    wanted = {sweep.metric for sweep in found}
    for name in wanted:
        _check_metric(name, records)
    measured = [
        (name, protocol)
        for name in sorted(wanted)
        for protocol in groups(p for r in records for p in _protocols(r, name)) or [{}]
    ]
    if len(measured) > 1 and not mixed:
        raise ValueError(_refusal([protocol for _, protocol in measured]))
    tables = []
    for name, protocol in measured:
        own = [_only(record, name, protocol) for record in records] if len(measured) > 1 else records
        rows = _rows([record for record in own if record.reports or len(measured) == 1], name, at)
        tables.append(_compared(Comparison(name, at, rows, None, names, protocol), baseline, mixed))
    if baseline is not None and all(table.baseline is None for table in tables):
        _find([row for table in tables for row in table.rows], baseline, names)
    return tables


@dataclass(frozen=True)
class _Sweep:
    """What is compared of one sweep."""

    metric: str
    names: list[str]
    records: list[TrialRecord]


def _read(folder: Path, metric: str | None, *, several: bool) -> _Sweep:
    if not (folder / "sweep.json").is_file() or not (folder / "journal.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a sweep: it has no sweep.json and journal.jsonl")
    config = read_config(folder / "sweep.json", SweepConfig)
    records = list(replay(read_events(folder / "journal.jsonl")).values())
    names = [key for key in config.space if target(key) != SEED]
    if several:
        records = [replace(record, params={SWEEP: str(folder), **record.params}) for record in records]
        names = [SWEEP, *names]
    return _Sweep(metric or config.objective, names, records)


def _protocols(record: TrialRecord, metric: str) -> list[Protocol]:
    """What the trial's values of a metric measure."""
    return [record.protocols.get(s, {}) for s, values in record.reports.items() if s and metric in values]


def _only(record: TrialRecord, metric: str, protocol: Protocol) -> TrialRecord:
    """The trial with its values of one protocol alone."""
    reports = {
        step: values
        for step, values in record.reports.items()
        if metric in values and not differences(record.protocols.get(step, {}), protocol)
    }
    return replace(record, reports=reports)


def _refusal(protocols: Sequence[Protocol]) -> str:
    """Why figures of these protocols are not compared."""
    first, *others = protocols
    why = "; ".join(dict.fromkeys(text for other in others for text in differences(other, first)))
    kinds = "".join(f"\n  {describe(protocol)}" for protocol in protocols)
    what = f"the figures are of {len(protocols)} protocols, which do not compare ({why})"
    return f"{what}: --mixed makes a table of each{kinds}"


def _compared(comparison: Comparison, baseline: dict[str, Scalar] | None, mixed: bool) -> Comparison:
    """Ranked, and set against the baseline; where there are several tables, in those that have it."""
    rows, found = comparison.rows, None
    if baseline is not None:
        try:
            found = _find(rows, baseline, comparison.names)
        except ValueError:
            if not mixed:
                raise
    for row in rows:
        row.difference = None if found is None or row is found else _difference(row, found)
    sign = -1 if rises(comparison.metric) else 1
    rows.sort(key=lambda row: math.inf if row.mean is None else sign * row.mean)
    return replace(comparison, baseline=found)


def _rows(records: Sequence[TrialRecord], metric: str, at: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in records:
        params = {name: value for name, value in record.params.items() if name != SEED}
        row = rows.setdefault(repr(sorted(params.items())), Row(params))
        row.statuses[record.status] += 1
        reported = {step: v[metric] for step, v in record.reports.items() if step and metric in v}
        if record.status == "completed" and reported:
            best = max if rises(metric) else min
            value = reported[max(reported)] if at == "last" else best(reported.values())
            row.values.setdefault(record.params.get(SEED), []).append(value)
    return list(rows.values())


def rises(metric: str) -> bool:
    """Whether a metric is better the higher it is."""
    return metric.startswith(_HIGHER_IS_BETTER)


def _check_metric(metric: str, records: Sequence[TrialRecord]) -> None:
    known = sorted({name for r in records for values in r.reports.values() for name in values})
    if metric not in known:
        rest = suggestion(metric, known) if known else "no trial has reported anything yet"
        raise ValueError(f"no trial has reported a metric {metric!r}; {rest}")


def _find(rows: Sequence[Row], baseline: dict[str, Scalar], names: dict[str, str]) -> Row:
    """The one row whose parameters are those of the baseline."""
    for name in baseline:
        if name not in names:
            raise ValueError(f"--baseline {name} is not searched; {suggestion(name, names)}")
    wanted = ", ".join(f"{name}={shown(value)}" for name, value in baseline.items())
    fit = [row for row in rows if all(row.params.get(name) == value for name, value in baseline.items())]
    if not fit:
        values = {name: {row.params[name] for row in rows if name in row.params} for name in baseline}
        known = "; ".join(f"{name}: {', '.join(sorted(map(str, v)))}" for name, v in values.items())
        raise ValueError(f"--baseline {wanted}: no trial has it; there are {known}")
    if len(fit) > 1:
        kinds = "; ".join(describe_params(row.params, names) for row in fit[:4])
        more = f" and {len(fit) - 4} more" if len(fit) > 4 else ""
        raise ValueError(f"--baseline {wanted} fits {len(fit)} rows ({kinds}{more}): name more parameters")
    return fit[0]


def _difference(row: Row, baseline: Row) -> Difference | None:
    if row.mean is None or baseline.mean is None:
        return None
    shared = [seed for seed in row.values if seed in baseline.values and seed is not None]
    if shared:
        pairs = [statistics.fmean(row.values[s]) - statistics.fmean(baseline.values[s]) for s in shared]
        return Difference(statistics.fmean(pairs), _standard_error(pairs), len(shared))
    errors = row.error, baseline.error
    error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    return Difference(row.mean - baseline.mean, error, 0)


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
