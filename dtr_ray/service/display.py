"""What the terminal shows while a sweep runs: a live table, or plain lines where there is no terminal."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtr_ray import log_lines
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.names import describe_params, figure, short_names, short_value
from dtr_ray.search.state import Happening, SweepState
from dtr_ray.service.attempts import read_heartbeat

_STYLES = {"running": "cyan", "completed": "green", "pruned": "yellow", "failed": "red"}
_MAX_ROWS = 24
_BAR_WIDTH = 12


class Display:
    """Shows a sweep while it runs; use as a context manager, and as a listener of the state."""

    def __init__(self, state: SweepState, console: Console | None = None) -> None:
        self._state = state
        self._console = console or Console(file=sys.stdout)
        self._live: Live | None = None
        self._names = short_names(state.config.space)
        self._pace: dict[str, tuple[float, int]] = {}
        """When, and at which step, this process first saw the trial train."""
        self._done_before = state.tally.steps
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Prints what happened as a line, where there is no live table."""
        if happening == "started":
            self._pace[trial.trial_id] = (time.monotonic(), trial.last_step)
        elif happening == "ended":
            self._pace.pop(trial.trial_id, None)
        if self._live is not None:
            return
        if happening == "started":
            text = f"starts: {describe_params(trial.params, self._names)}"
            text += f", going on from step {trial.last_step}" if trial.last_step else ""
        elif happening == "reported":
            text = self._reported(trial)
        elif happening == "retried":
            text = f"goes on from its newest checkpoint: {trial.retry_reason}"
        else:
            text = {"pruned": "stopped early"}.get(trial.status, trial.status)
            text += f" ({trial.reason})" if trial.reason else ""
            text += f"; {self._summary()}"
        line = f"[{clock(self._state.seconds)}] {trial.trial_id} {text}"
        step, metric = trial.last_step, self._state.evaluation.metric_at(trial.last_step)
        fields = {"metric": metric, "value": trial.reports[step][metric]} if happening == "reported" else {}
        with log_lines.about(trial=trial.trial_id, step=step, event=happening, status=trial.status, **fields):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _reported(self, trial: TrialRecord) -> str:
        step, total = trial.last_step, self._num_steps(trial)
        metric = self._state.evaluation.metric_at(step)
        value = f"{metric} {figure(trial.reports[step], metric)}"
        if step == 0:
            return f"{value} before the first step"
        left = self._trial_seconds_left(trial, step)
        rest = f", {clock(left)} to its last step" if left else ""
        return f"{step / total:.0%} (step {step}/{total}), {value}{rest}"

    def table(self) -> Table:
        """All trials, the running ones with their progress."""
        table = Table(
            title=self._summary(),
            title_justify="left",
            title_style="bold",
            caption_justify="left",
            box=box.SIMPLE,
        )
        metric = self._state.metric.partition("_")[0]
        for heading in ("trial", *self._names.values(), "step", "", "left", metric, "status"):
            table.add_column(heading, no_wrap=True, min_width=len(heading))
        records = list(self._state.trials.values())
        best = self._state.best()
        for record in records[-_MAX_ROWS:]:
            table.add_row(*self._row(record, None if best is None else best[0]))
        table.caption = f"{metric} is {self._state.metric}, the smaller the better"
        proxy = self._state.evaluation.proxy_metric
        table.caption += "" if proxy is None else f"; in brackets {proxy}, which is never the best"
        if len(records) > _MAX_ROWS:
            table.caption += f"; {len(records) - _MAX_ROWS} trials before are not shown"
        return table

    def _row(self, record: TrialRecord, leader: TrialRecord | None) -> list[Any]:
        total = self._num_steps(record)
        step, phase, left = record.last_step, record.status, None
        if record.status == "running":
            heartbeat = read_heartbeat(self._state.trial_folder(record.trial_id))
            step = max(step, heartbeat.get("step", 0))
            phase = heartbeat.get("phase", "starting")
            left = self._trial_seconds_left(record, step)
        value = Text(self._value(record))
        if leader is record:
            value.stylize("bold green")
        cells = [short_value(record.params.get(name, "")) for name in self._names]
        bar = ProgressBar(total=total, completed=step, width=_BAR_WIDTH)
        state = Text(phase, _STYLES[record.status])
        return [record.trial_id, *cells, f"{step}/{total}", bar, clock(left) if left else "", value, state]

    def _value(self, record: TrialRecord) -> str:
        """The trial's best value; that of the proxy in brackets, until it has another."""
        best, proxy = record.best(self._state.metric), self._state.evaluation.proxy_metric
        if best is None and proxy is not None:
            cheaper = record.best(proxy)
            return "" if cheaper is None else f"({cheaper[1]:.4g})"
        return "" if best is None else f"{best[1]:.4g}"

    def _summary(self) -> str:
        tally = self._state.tally
        parts = [
            f"{tally.count('completed')} completed, {tally.count('pruned')} stopped early, "
            f"{tally.count('failed')} failed, {tally.count('running')} running "
            f"of {self._state.config.search.num_trials}"
        ]
        best = self._state.best()
        if best is not None:
            parts.append(f"best {best[2]:.4g} ({best[0].trial_id})")
        left = self._seconds_left()
        parts.append(f"{clock(self._state.seconds)}" + (f", at most {clock(left)} left" if left else ""))
        return "; ".join(parts)

    def _num_steps(self, record: TrialRecord) -> int:
        return int(record.params.get("training.num_steps", self._state.config.trial.training.num_steps))

    def _trial_seconds_left(self, record: TrialRecord, step: int) -> float | None:
        """Time to the trial's last step, at its pace in this process."""
        started, before = self._pace.get(record.trial_id, (0.0, step))
        if step <= before:
            return None
        return (time.monotonic() - started) / (step - before) * (self._num_steps(record) - step)

    def _seconds_left(self) -> float | None:
        """Time to the end if no further trial were stopped early, at the pace so far."""
        done = self._state.tally.steps - self._done_before
        if done <= 0:
            return None
        full = self._state.config.trial.training.num_steps
        to_come = (self._state.config.search.num_trials - len(self._state.trials)) * full
        to_come += sum(self._num_steps(r) - r.last_step for r in self._state.running)
        return (time.monotonic() - self._started) / done * to_come


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
