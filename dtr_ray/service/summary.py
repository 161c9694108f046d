"""The end of a sweep on the terminal: best trials, what mattered, and what to type next."""

import statistics

from rich.console import Console
from rich.table import Table

from dtr_ray.service.display import clock
from dtr_ray.service.study import importances
from dtr_ray.service.sweep import Outcome
from dtr_ray.service.tracking import ui_command

_MAX_TRIALS = 5


def print_summary(outcome: Outcome, console: Console | None = None) -> None:
    """Prints the best trials, the spread, parameter importances, and the next commands."""
    console = console or Console()
    state, metric = outcome.state, outcome.state.metric
    ranked = sorted(
        ((best[1], r.number, best[0], r) for r in state.trials.values() if r.status != "failed" and (best := r.best(metric))),
        key=lambda row: row[:2],
    )
    table = Table(title=f"best of {len(state.trials)} trials", title_justify="left")
    for heading in ("trial", *state.config.space, "step", metric, "status"):
        table.add_column(heading)
    for value, _, step, record in ranked[:_MAX_TRIALS]:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (record.params.get(n, "") for n in state.config.space)]
        table.add_row(record.trial_id, *cells, str(step), f"{value:.4g}", record.status)
    console.print(table)
    _print_lines(outcome, [row[0] for row in ranked], console)


def _print_lines(outcome: Outcome, values: list[float], console: Console) -> None:
    state, metric = outcome.state, outcome.state.metric

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if values:
        untrained = state.untrained_value
        line = f"{metric}: best {values[0]:.4g}, median of all trials {statistics.median(values):.4g}"
        say(line + (f", untrained model {untrained:.4g}" if untrained is not None else ""))
    step, weights = importances(list(state.trials.values()), state.config.space, metric)
    if weights:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in weights.items())
        say(f"importance for {metric} at step {step:,}: {shares}")
    for record in state.failed:
        say(f"{record.trial_id} failed: {record.reason} (traceback: {state.trial_folder(record.trial_id) / 'error.txt'})")
    spent = sum(r.train_seconds for r in state.trials.values())
    share = spent / max(outcome.fit_seconds * outcome.num_concurrent, 1e-9)
    say(f"{clock(state.seconds)} in all; trials trained for {share:.0%} of the time they could have")
    if outcome.records_waiting:
        say(f"MLflow at {outcome.tracking_uri} has not taken {outcome.records_waiting} records yet: --resume sends them")
    if outcome.error:
        say(f"the sweep ended early: {outcome.error}")
    say("")
    say(f"results     {state.folder}/trials.csv, best.json" + (", montage.png" if outcome.montage else ""))
    say(f"compare     {ui_command(outcome.tracking_uri)}")
    if outcome.best is not None:
        say(f"train best  python -m dtr_ray.train_best {state.folder}")
