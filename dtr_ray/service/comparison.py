"""Comparing the methods of a sweep over seeds: trials that differ in `training.seed` alone are one row.

Reads the journal alone, so that a sweep can be looked at while it runs.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dtr_ray.config import SweepConfig
from dtr_ray.config.errors import shown, suggestion
from dtr_ray.config.space import Scalar, target
from dtr_ray.service.journal import TrialRecord, read_events, replay
from dtr_ray.service.names import describe_params, short_names, short_value

SEED = "training.seed"
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


def compare_trials(
    folder: Path, metric: str | None = None, baseline: dict[str, Scalar] | None = None, at: str = "best"
) -> Comparison:
    """Groups the trials of a sweep, finished or running.

    Only completed trials count: those stopped early have trained for less.

    Args:
        folder: the sweep's.
        metric: one that its trials report; default: what it minimises.
        baseline: searched parameters by dotted name, that fit one row alone; None compares with none.
        at: `best`, each trial's best value, by which the sweep ranks; or `last`, that of its last step.

    Raises:
        ValueError: there is no sweep, no such metric, or not one such row.
    """
    if not (folder / "sweep.json").is_file() or not (folder / "journal.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a sweep: it has no sweep.json and journal.jsonl")
    config = SweepConfig.model_validate_json((folder / "sweep.json").read_text(encoding="utf-8"))
    records = list(replay(read_events(folder / "journal.jsonl")).values())
    metric = metric or config.objective
    _check_metric(metric, records)
    names = short_names(key for key in config.space if target(key) != SEED)
    rows = _rows(records, metric, at)
    found = None if baseline is None else _find(rows, baseline, names)
    if found is not None:
        for row in rows:
            row.difference = None if row is found else _difference(row, found)
    sign = -1 if _rises(metric) else 1
    rows.sort(key=lambda row: math.inf if row.mean is None else sign * row.mean)
    return Comparison(metric, at, rows, found, names)


def _rows(records: Sequence[TrialRecord], metric: str, at: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in records:
        params = {name: value for name, value in record.params.items() if name != SEED}
        row = rows.setdefault(repr(sorted(params.items())), Row(params))
        row.statuses[record.status] += 1
        reported = {step: v[metric] for step, v in record.reports.items() if step and metric in v}
        if record.status == "completed" and reported:
            best = max if _rises(metric) else min
            value = reported[max(reported)] if at == "last" else best(reported.values())
            row.values.setdefault(record.params.get(SEED), []).append(value)
    return list(rows.values())


def _rises(metric: str) -> bool:
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


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    which = "last value" if comparison.at == "last" else "best value of each trial"
    table = Table(
        title=f"{comparison.metric} ({which}), mean over seeds",
        title_justify="left",
        title_style="bold",
        caption=_caption(comparison),
        caption_justify="left",
        box=box.SIMPLE,
    )
    widths = [
        max(map(len, cells))
        for cells in zip(*(_cells(comparison, row) for row in comparison.rows), strict=True)
    ]
    for number, (heading, width) in enumerate(zip(_headings(comparison), widths, strict=True)):
        # On a narrow terminal names are folded, and figures stay whole.
        folds = number < len(comparison.names) or heading == "trials"
        least = len(heading) if folds else max(len(heading), width)
        table.add_column(heading, overflow="fold", no_wrap=not folds, min_width=least)
    for row in comparison.rows:
        table.add_row(*_cells(comparison, row), style="bold" if row is comparison.baseline else None)
    return table


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `compare.csv`, with every digit, and `compare.md`, a Markdown table; returns their paths."""
    text = io.StringIO(newline="")
    statistics_ = ["n", "mean", "standard_error", "difference", "difference_error", "difference_pairs"]
    writer = csv.writer(text)
    writer.writerow([*comparison.names, *statistics_, "baseline", "trials"])
    for row in comparison.rows:
        gap = row.difference
        figures = [len(row.all_values), row.mean, row.error]
        figures += [None] * 3 if gap is None else [gap.mean, gap.error, gap.num_pairs]
        params = [row.params.get(name, "") for name in comparison.names]
        writer.writerow([*params, *figures, int(row is comparison.baseline), _counts(row)])
    lines = [_headings(comparison), ["---"] * len(_headings(comparison))]
    lines += [_cells(comparison, row) for row in comparison.rows]
    markdown = "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )
    title = f"{comparison.metric}, {comparison.at} value of each trial.\n{_caption(comparison)}\n\n"
    paths = []
    for name, content in (("compare.csv", text.getvalue()), ("compare.md", title + markdown)):
        path = folder / name
        temporary = path.with_suffix(f"{path.suffix}.tmp")
        temporary.write_text(content, encoding="utf-8", newline="")
        temporary.replace(path)
        paths.append(path)
    return paths


def _caption(comparison: Comparison) -> str:
    better = "higher" if _rises(comparison.metric) else "smaller"
    text = f"The {better} the better; completed trials alone; ± is one standard error."
    if comparison.baseline is not None:
        base = describe_params(comparison.baseline.params, comparison.names) or "the only row"
        text += f" Differences are to {base}, seed by seed where both have it (pairs)."
    return text


def _headings(comparison: Comparison) -> list[str]:
    gap = ["difference", "pairs"] if comparison.baseline is not None else []
    return [*comparison.names.values(), "mean", "± se", "n", *gap, "trials"]


def _cells(comparison: Comparison, row: Row) -> list[str]:
    params = [short_value(row.params.get(name, "")) for name in comparison.names]
    gap = list(_gap(comparison, row)) if comparison.baseline is not None else []
    return [*params, _number(row.mean), _number(row.error, 2), str(len(row.all_values)), *gap, _counts(row)]


def _gap(comparison: Comparison, row: Row) -> Iterator[str]:
    if row is comparison.baseline:
        yield from ("baseline", "")
    elif row.difference is None:
        yield from ("", "")
    else:
        error = "" if row.difference.error is None else f" ± {_number(row.difference.error, 2)}"
        yield f"{row.difference.mean:+.3g}{error}"
        yield str(row.difference.num_pairs)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _counts(row: Row) -> str:
    """How the row's trials stand: `3 completed, 1 running`."""
    words = {"pruned": "stopped early"}
    order = ("completed", "pruned", "failed", "running")
    return ", ".join(f"{row.statuses[s]} {words.get(s, s)}" for s in order if row.statuses[s])
