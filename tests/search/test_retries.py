"""What is kept of trials whose process died, and another went on."""

import csv
from pathlib import Path

from tiny_sweeps import folder_of, records, tiny_sweep

from dtr_ray.search.results import write_trials
from dtr_ray.search.state import SweepState


def test_retries_and_moves_are_kept_apart_and_told(tmp_path: Path):
    config = tiny_sweep(tmp_path)
    folder = folder_of(config)
    folder.mkdir()
    state, heard = SweepState(config, folder), []
    state.listeners.append(lambda happening, trial: heard.append((happening, trial.trial_id)))
    for _ in range(2):
        state.next_trial()
    state.retry("t0000", "no sign of life for 301 s", counted=True)
    state.retry("t0000", "left its machine after step 7, with a checkpoint", counted=False)
    state.finish("t0001", "failed", "out of memory")
    state.retry("t0001", "too late", counted=True)
    write_trials(state)
    state.close()
    assert heard[2:] == [("retried", "t0000"), ("retried", "t0000"), ("ended", "t0001")]
    found = records(folder)
    assert [(trial.retries, trial.moves) for trial in found.values()] == [(1, 1), (0, 0)]
    assert found["t0000"].retry_reason.startswith("left its machine")
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        assert [row["retries"] for row in csv.DictReader(file)] == ["1", "0"]
