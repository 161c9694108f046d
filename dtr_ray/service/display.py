"""What the terminal shows while a sweep runs: a live table, or plain lines where there is no terminal."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.state import Happening, SweepState

_STYLES = {"running": "cyan", "completed": "green", "pruned": "yellow", "failed": "red"}
_MAX_ROWS = 24


class Display:
    """Shows a sweep while it runs; use as a context manager, and as a listener of the state."""

    def __init__(self, state: SweepState, console: Console | None = None) -> None:
        self._state = state
        self._console = console or Console(file=sys.stdout)
        self._live: Live | None = None
        self._steps = {t: state.config.trial_config(r.params).training.num_steps for t, r in state.trials.items()}
        self._done_before = sum(self._steps_done(r) for r in state.trials.values())
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
        self._steps[trial.trial_id] = self._state.config.trial_config(trial.params).training.num_steps
        if self._live is not None:
            return
        text = f"[{clock(self._state.seconds)}] {trial.trial_id} "
        if happening == "started":
            text += f"starts: {describe_params(trial.params)}"
        elif happening == "reported":
            value = trial.reports[trial.last_step][self._state.metric]
            text += f"step {trial.last_step}/{self._steps[trial.trial_id]}: {self._state.metric} {value:.4g}"
        else:
            text += f"{trial.status}{': ' + trial.reason if trial.reason else ''}"
            text += f"; {self._summary()}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """All trials, the running ones with their progress."""
        names = list(self._state.config.space)
        table = Table(title=self._summary(), title_justify="left", title_style="bold", expand=False)
        for heading in ("trial", *names, "step", "", self._state.metric, "status"):
            table.add_column(heading.removeprefix("routing."), no_wrap=True)
        records = list(self._state.trials.values())
        for record in records[-_MAX_ROWS:]:
            table.add_row(*self._row(record, names))
        if len(records) > _MAX_ROWS:
            table.caption = f"and {len(records) - _MAX_ROWS} trials before"
        return table

    def _row(self, record: TrialRecord, names: list[str]) -> list[Any]:
        total = self._steps.get(record.trial_id, self._state.config.trial.training.num_steps)
        step, phase = record.last_step, record.status
        if record.status == "running":
            heartbeat = read_heartbeat(self._state.trial_folder(record.trial_id))
            step = max(step, heartbeat.get("step", 0))
            phase = heartbeat.get("phase", "starting")
        best = record.best(self._state.metric)
        leader = self._state.best()
        value = Text("" if best is None else f"{best[1]:.4g}")
        if leader is not None and leader[0] is record:
            value.stylize("bold green")
        bar = ProgressBar(total=total, completed=step, width=14)
        cells = [_short(record.params.get(name, "")) for name in names]
        return [record.trial_id, *cells, f"{step}/{total}", bar, value, Text(phase, _STYLES[record.status])]

    def _summary(self) -> str:
        records = list(self._state.trials.values())
        counts = {s: sum(r.status == s for r in records) for s in _STYLES}
        parts = [f"{counts['completed']} completed, {counts['pruned']} stopped early, {counts['failed']} failed"]
        parts.append(f"{counts['running']} running of {self._state.config.search.num_trials}")
        best = self._state.best()
        if best is not None:
            parts.append(f"best {best[2]:.4g} ({best[0].trial_id})")
        left = self._seconds_left()
        parts.append(f"{clock(self._state.seconds)} gone" + (f", at most {clock(left)} left" if left else ""))
        return " · ".join(parts)

    def _steps_done(self, record: TrialRecord) -> int:
        return record.last_step

    def _seconds_left(self) -> float | None:
        """Time to the end if no further trial were stopped early, at the pace so far."""
        records = list(self._state.trials.values())
        done = sum(self._steps_done(r) for r in records) - self._done_before
        if done <= 0:
            return None
        full = self._state.config.trial.training.num_steps
        to_come = (self._state.config.search.num_trials - len(records)) * full
        to_come += sum(self._steps.get(r.trial_id, full) - r.last_step for r in records if r.status == "running")
        return (time.monotonic() - self._started) / done * to_come


def read_heartbeat(trial_folder: Path) -> dict[str, Any]:
    """The trial's newest sign of life: `step`, `phase`, `time`; empty before the first."""
    try:
        found: dict[str, Any] = json.loads((trial_folder / "progress.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def describe_params(params: dict[str, Any]) -> str:
    """Parameters in one line: `alpha 4, beta 0.8, weighting min_snr`."""
    return ", ".join(f"{name.removeprefix('routing.').removesuffix('.name')} {_short(v)}" for name, v in params.items())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
