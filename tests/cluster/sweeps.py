"""A tiny sweep over machines, and what it leaves."""

import json
import time
from collections.abc import Callable
from pathlib import Path

PARTS = ("gcs_server", "raylet/raylet")
"""Ray's own processes, by their command lines."""
SWEEP = (
    "search_spaces/quickstart.yaml --output /mnt/shared/runs --trials 4"
    " --set trial.training.num_steps=20 --set trial.evaluation.every_steps=10"
    " --set trial.evaluation.num_samples=64 --set early_stopping.grace_steps=10"
)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 120) -> float:
    """The seconds that it took; raises AssertionError where it takes too long."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, f"not in {seconds:g} s: {what}"
        time.sleep(1)
    return time.monotonic() - start


def hosts_of_trials(output: Path) -> dict[str, str]:
    """The machine that each trial first ran on."""
    return {
        path.parent.name: json.loads(path.read_text().splitlines()[0])["host"]
        for path in sorted(output.glob("*/trials/*/attempts.jsonl"))
    }


def finished_trials(output: Path) -> int:
    """The trials of the one sweep in a folder, which has found its best."""
    (best,) = output.glob("*/best.json")
    assert json.loads(best.read_text())
    return len(list(output.glob("*/trials/*/")))
