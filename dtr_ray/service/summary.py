"""The end of a sweep on the terminal: best trials, what mattered, and what to type next."""

import shlex
import statistics
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from dtr_ray.config.protocol import describe
from dtr_ray.search.database import without_password
from dtr_ray.search.names import figure, short_names, short_value
from dtr_ray.search.state import SweepState
from dtr_ray.search.study import importances
from dtr_ray.service.display import clock
from dtr_ray.service.storing import place_of
from dtr_ray.service.sweep import Outcome
from dtr_ray.service.tracking import ui_command

_MAX_TRIALS = 5


def print_summary(outcome: Outcome, console: Console | None = None) -> None:
    """Prints the best trials, the spread, parameter importances, and the next commands."""
    console = console or Console()
    state = outcome.state
    if state.ranked():
        console.print(_table(state))
    for line in (*_figures(state), *_troubles(outcome), *_time(outcome), "", *_next(outcome)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(state: SweepState) -> Table:
    ranked, names = state.ranked(), short_names(state.config.space)
    metric = state.metric.partition("_")[0]
    title = f"the best {min(len(ranked), _MAX_TRIALS)} of {len(state.trials)} trials"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for heading in ("trial", *names.values(), "step", metric, "status"):
        table.add_column(heading, no_wrap=True, min_width=len(heading))
    for record, step, _ in ranked[:_MAX_TRIALS]:
        cells = [short_value(record.params.get(name, "")) for name in names]
        value = figure(record.reports[step], state.metric)
        table.add_row(record.trial_id, *cells, str(step), value, record.status)
    return table


def _figures(state: SweepState) -> Iterator[str]:
    """Spread and importances."""
    metric = state.metric
    values = [value for _, _, value in state.ranked()]
    if values:
        of = "all" if len(values) == len(state.trials) else f"{len(values)}"
        line = f"{metric}: best {values[0]:.4g}, median of {of} trials {statistics.median(values):.4g}"
        untrained, name = state.untrained_value, state.evaluation.metric_at(0)
        also = "" if name == metric else f" ({name})"
        yield line + (f", untrained model {untrained:.4g}{also}" if untrained is not None else "")
        yield f"measured    {describe(state.protocol)}"
    yield from _proxies(state)
    step, weights = importances(list(state.trials.values()), state.config.space, state.evaluation)
    if weights:
        names = short_names(state.config.space)
        shares = ", ".join(f"{names.get(key, key)} {share:.0%}" for key, share in weights.items())
        yield f"importance for {state.evaluation.metric_at(step)} at step {step:,}: {shares}"


def _proxies(state: SweepState) -> Iterator[str]:
    """Trials of which the proxy alone is known."""
    proxy = state.evaluation.proxy_metric
    if proxy is None:
        return
    values = sorted(
        (found[1], record.trial_id)
        for record in state.trials.values()
        if record.best(state.metric) is None and (found := record.best(proxy)) is not None
    )
    if values and not state.ranked():
        value, trial_id = values[0]
        yield f"no trial has reached a full {state.metric}: there is no best trial, and no best.json"
        yield f"{len(values)} have a {proxy} alone, the lowest {value:.4g} ({trial_id}): it is no result"
    elif values:
        share = f"{len(values)} of {len(state.trials)} trials"
        yield f"ended with a {proxy} alone, without a {state.metric}: {share}"


def _troubles(outcome: Outcome) -> Iterator[str]:
    state = outcome.state
    for record in state.failed:
        traceback = state.trial_folder(record.trial_id) / "error.txt"
        where = f" (traceback: {traceback})" if traceback.exists() else ""
        yield f"{record.trial_id} failed: {record.reason}{where}"
    if outcome.records_waiting:
        uri, count = without_password(outcome.tracking_uri), outcome.records_waiting
        yield f"MLflow at {uri} has not taken {count} records; they wait on disk, and --resume sends them"
    if outcome.ending:
        yield f"the sweep ended early: {outcome.ending}"


def _time(outcome: Outcome) -> Iterator[str]:
    state = outcome.state
    if not outcome.fit_seconds:
        yield f"all trials had ended before; {clock(state.seconds)} in all"
        return
    spent = sum(record.train_seconds for record in state.trials.values())
    wall = sum(record.wall_s for record in state.trials.values())
    share = f"{spent / max(wall, 1e-9):.0%}"
    yield f"{clock(state.seconds)} in all; trials spent {share} of their time in training steps"


def _next(outcome: Outcome) -> Iterator[str]:
    folder = place_of(outcome.state.config, outcome.state.folder)
    files = [
        "trials.csv",
        *(["best.json"] if outcome.best else []),
        *(["montage.png"] if outcome.montage else []),
    ]
    yield f"results     {folder}: {', '.join(files)}"
    yield f"compare     {ui_command(outcome.tracking_uri)}"
    if outcome.best is not None:
        yield f"train best  python -m dtr_ray.train_best {shlex.quote(folder)}"
