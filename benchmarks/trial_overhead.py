"""Seconds that a sweep's trial costs beyond its own training and evaluation, for one and for two workers.

    python benchmarks/trial_overhead.py [--trials 6] [--workers 1 2]

Runs a sweep of trials that train for a second on this machine's CPUs, one after the other, in a folder that
is removed afterwards. All figures are from the sweep's own journal and its trials' attempts:

- start: from the moment a trial is suggested to its first training step, which is taken out;
- end: from its last report to the moment its slot is free, so that the next trial is suggested;
- beyond: all the time it held its slot, less its training and its evaluations.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import read_events, replay
from dtr_ray.service.attempts import read_attempts
from dtr_ray.service.sweep import run_sweep

TRIAL: dict[str, Any] = {
    "data": {"name": "digits", "resolution": 8},
    "model": {"name": "DiT", "hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 2},
    "training": {"num_steps": 60, "batch_size": 32, "lr": 2e-3, "ema_decay": 0.9},
    "sampling": {"sampler": "ddim", "num_steps": 4, "clip_denoised": True},
    "evaluation": {"every_steps": 20, "num_samples": 64, "features": "efficientnet_lite0"},
}


def run(num_workers: int, num_trials: int, output: Path) -> list[tuple[float, float, float, float]]:
    """(start, end, beyond, held) in seconds of each trial, in order."""
    config = SweepConfig.from_dict(
        {
            "name": f"workers{num_workers}",
            "trial": TRIAL,
            "space": {"routing.alpha": {"type": "uniform", "low": 1.0, "high": 8.0}},
            "search": {"num_trials": num_trials, "sampler": "random"},
            "resources": {"workers_per_trial": num_workers, "max_concurrent": 1},
            "storage": {"output": str(output)},
        }
    )
    folder = output / config.name
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = run_sweep(config, folder)
    assert outcome.error is None, outcome.error
    events = read_events(folder / "journal.jsonl")
    suggested = {event["id"]: event["time"] for event in events if event["event"] == "trial"}
    reported = {event["id"]: event["time"] for event in events if event["event"] == "report"}
    ended = {event["id"]: event["time"] for event in events if event["event"] == "end"}
    free = [*list(suggested.values())[1:], ended[f"t{num_trials - 1:04d}"]]
    rows = []
    for (trial_id, record), freed in zip(replay(events).items(), free, strict=True):
        (attempt,) = read_attempts(folder / "trials" / trial_id)
        assert attempt.first_step_s is not None
        own = record.train_seconds + sum(values["eval_seconds"] for values in record.reports.values())
        step_s = record.train_seconds / record.last_step
        untrained_s = record.reports[0]["eval_seconds"] if 0 in record.reports else 0.0
        start = attempt.started + attempt.first_step_s - suggested[trial_id] - step_s - untrained_s
        held = freed - suggested[trial_id]
        rows.append((start, freed - reported[trial_id], held - own, held))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds that a trial costs beyond its training and evaluation."
    )
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    table = Table(title="seconds a trial, beyond its own training and evaluation", title_justify="left")
    for heading in ("workers", "trial", "start", "end", "beyond", "held its slot"):
        table.add_column(heading, justify="right")
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as output:
            rows = run(workers, options.trials, Path(output))
        ray.shutdown()
        for name, part in (("first", rows[:1]), ("each later", rows[1:]), ("mean of all", rows)):
            means = [statistics.mean(column) for column in zip(*part, strict=True)]
            table.add_row(str(workers), name, *(f"{seconds:.2f}" for seconds in means))
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
