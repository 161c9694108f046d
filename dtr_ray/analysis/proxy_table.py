"""What a study of a proxy found, for a terminal."""

import statistics
from collections.abc import Iterator

from rich import box
from rich.table import Table
from scipy.stats import rankdata

from dtr_ray.analysis.proxies import Agreement, Measured, ProxyStudy
from dtr_ray.analysis.ranks import Correlation
from dtr_ray.config.protocol import describe


def study_table(study: ProxyStudy) -> Table:
    """A row a checkpoint, with its rank among those of the same step by either figure."""
    table = Table(title_justify="left", title_style="bold", box=box.SIMPLE)
    table.title = f"{study.proxy_metric} against {study.metric}"
    for heading in ("trial", "step", "proxy", "rank", "full", "rank", "proxy, s", "full, s"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "trial" else "right")
    for step in sorted({each.step for each in study.measured}):
        group = [each for each in study.measured if each.step == step]
        ranks = zip(rankdata([m.proxy for m in group]), rankdata([m.full for m in group]), strict=True)
        for each, (proxy_rank, full_rank) in zip(group, ranks, strict=True):
            table.add_row(*_cells(each, f"{proxy_rank:g}", f"{full_rank:g}"))
    return table


def _cells(each: Measured, proxy_rank: str, full_rank: str) -> Iterator[str]:
    yield from (each.trial, f"{each.step:,}")
    yield from (_figure(each.proxy, each.proxy_stderr), proxy_rank)
    yield from (_figure(each.full, each.full_stderr), full_rank)
    yield from (f"{each.proxy_seconds:.1f}", f"{each.full_seconds:.1f}")


def _figure(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def study_lines(study: ProxyStudy) -> Iterator[str]:
    """The agreement in words, the times, and what was measured."""
    agreements = study.agreements
    for found in agreements:
        yield from _agreement(found)
    if not any(found.step is not None for found in agreements):
        yield "no training step has checkpoints of three trials: there is no rank correlation at one step"
    full, proxy = ([m.full_seconds for m in study.measured], [m.proxy_seconds for m in study.measured])
    medians = statistics.median(full), statistics.median(proxy)
    yield (
        f"time: {medians[1]:.3g} s against {medians[0]:.3g} s (medians), {medians[1] / medians[0]:.2g} of it"
    )
    for protocol in study.protocols:
        yield f"measured: {describe(protocol)}"


def _agreement(found: Agreement) -> Iterator[str]:
    where = "all steps together (flatters: longer training is better by either)"
    where = f"step {found.step:,}" if found.step is not None else where
    yield (
        f"{where}, {found.count} checkpoints: Spearman {_correlation(found.spearman)}, "
        f"Kendall {_correlation(found.kendall)}; the proxy's better half holds {found.kept} of the better "
        f"{found.count // 2}"
    )


def _correlation(found: Correlation) -> str:
    return f"{found.value:.2f} (95 %: {found.low:.2f} to {found.high:.2f}; p {found.p_value:.2g})"
