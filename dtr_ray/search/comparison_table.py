"""A comparison of methods for the terminal, and as files."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from dtr_ray.config.protocol import describe
from dtr_ray.search.comparison import Comparison, Row, rises
from dtr_ray.search.names import describe_params, short_value


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


def write_comparison(tables: Comparison | Sequence[Comparison], folder: Path) -> list[Path]:
    """Writes `compare.csv`, with every digit, and `compare.md`, Markdown tables; returns their paths."""
    tables = [tables] if isinstance(tables, Comparison) else tables
    paths = []
    for name, content in (("compare.csv", _csv(tables)), ("compare.md", "\n".join(map(_markdown, tables)))):
        path = folder / name
        temporary = path.with_suffix(f"{path.suffix}.tmp")
        temporary.write_text(content, encoding="utf-8", newline="")
        temporary.replace(path)
        paths.append(path)
    return paths


def _csv(tables: Sequence[Comparison]) -> str:
    text = io.StringIO(newline="")
    statistics_ = ["n", "mean", "standard_error", "difference", "difference_error", "difference_pairs"]
    writer = csv.writer(text)
    writer.writerow([*tables[0].names, *statistics_, "baseline", "trials", "metric", "protocol"])
    for table in tables:
        for row in table.rows:
            gap = row.difference
            figures = [len(row.all_values), row.mean, row.error]
            figures += [None] * 3 if gap is None else [gap.mean, gap.error, gap.num_pairs]
            params = [row.params.get(name, "") for name in table.names]
            what = [int(row is table.baseline), _counts(row), table.metric, describe(table.protocol)]
            writer.writerow([*params, *figures, *what])
    return text.getvalue()


def _markdown(table: Comparison) -> str:
    lines = [_headings(table), ["---"] * len(_headings(table))]
    lines += [_cells(table, row) for row in table.rows]
    cells = "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )
    return f"{table.metric}, {table.at} value of each trial.\n{_caption(table)}\n\n{cells}"


def _caption(comparison: Comparison) -> str:
    better = "higher" if rises(comparison.metric) else "smaller"
    text = f"The {better} the better; completed trials alone; ± is one standard error."
    if comparison.baseline is not None:
        base = describe_params(comparison.baseline.params, comparison.names) or "the only row"
        text += f" Differences are to {base}, seed by seed where both have it (pairs)."
    return f"{text} Measured: {describe(comparison.protocol)}."


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
