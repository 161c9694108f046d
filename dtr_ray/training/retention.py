"""Retention: which checkpoints of a trial stay, so that its disk is bounded.

The best and the last; while it trains also the one before the last, to fall back to if the last is damaged.
That one goes before the next is written, so there are never more than MOST on the disk, and LASTING when the
trial has ended.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtr_ray.config import TrialConfig
from dtr_ray.disk import write_durably
from dtr_ray.training.reports import Report, best_report
from dtr_ray.training.state import TrainingState, checkpoint_folder, prune_checkpoints

MOST, LASTING = 3, 2


def save_checkpoint(config: TrialConfig, folder: Path, state: TrainingState, known: list[Report]) -> None:
    """Writes the checkpoint of this step, after making room for it; the newest whole one stays."""
    keep(config, folder, known, state.saved_step)
    state.save(checkpoint_folder(folder, state.step), config)
    keep(config, folder, known, state.saved_step, state.saved_before)


def keep(config: TrialConfig, folder: Path, known: list[Report], *steps: int | None) -> None:
    """Notes the best report in `best.json`; removes all checkpoints but its own and those of `steps`.

    Nothing is removed where neither a step nor a best report is known.
    """
    kept = {step for step in steps if step is not None}
    metric = config.evaluation.metric
    best = best_report(known, metric)
    if best is not None:
        kept.add(best.step)
        write_durably(folder / "best.json", json.dumps({"step": best.step, metric: best.metrics[metric]}))
    if kept:
        prune_checkpoints(folder, kept)


@contextmanager
def best_and_last(
    config: TrialConfig, folder: Path, state: TrainingState, known: list[Report]
) -> Iterator[None]:
    """Keeps no more than those two when the trial has reached its end, or is stopped; not after an error."""
    try:
        yield
    except GeneratorExit:
        keep(config, folder, known, state.saved_step)
        raise
    keep(config, folder, known, state.saved_step)
