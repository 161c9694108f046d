"""What a sweep leaves behind: best.json, trials.csv, and the montage of best and worst."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dtr_ray.config import flatten
from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.state import SweepState


def write_best(state: SweepState, mlflow_run_id: str | None) -> dict[str, Any] | None:
    """Writes `best.json`, the best trial with its resolved configuration; None while no trial has a value."""
    best = state.best()
    if best is None:
        return None
    trial, step, value = best
    checkpoint = Path("trials") / trial.trial_id / trial.checkpoints[step]
    content = {
        "trial_id": trial.trial_id,
        "metric": state.metric,
        "mode": "min",
        "value": value,
        "step": step,
        "params": trial.params,
        "config": state.config.trial_config(trial.params).to_dict(),
        "checkpoint": checkpoint.as_posix(),
        "mlflow_run_id": mlflow_run_id,
    }
    _replace(state.folder / "best.json", json.dumps(content, indent=2) + "\n")
    return content


def write_trials(state: SweepState) -> None:
    """Writes `trials.csv`: one row a trial, with the last and the best value of every reported metric."""
    records = list(state.trials.values())
    names = sorted({name for r in records for values in r.reports.values() for name in values})
    path = state.folder / "trials.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        heads = [f"{name}.{which}" for name in names for which in ("last", "best")]
        columns = ["id", "status", "reason", "steps", *state.config.space, *heads, "wall_seconds", "device_seconds"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(_row(state, record, names) for record in records)
    temporary.replace(path)


def _row(state: SweepState, record: TrialRecord, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.trial_id, "status": record.status, "reason": record.reason}
    row["steps"] = record.last_step
    resolved = flatten(state.config.trial_config(record.params).to_dict())
    row.update({name: resolved.get(name, "") for name in state.config.space})
    for name in names:
        reported = {step: values[name] for step, values in record.reports.items() if name in values}
        if reported:
            best = max if name.endswith(("_s", "seconds")) else min
            row[f"{name}.last"], row[f"{name}.best"] = reported[max(reported)], best(reported.values())
    row["wall_seconds"] = round(record.wall_s, 2)
    row["device_seconds"] = round(record.wall_s * state.devices_per_trial, 2)
    return row


def write_montage(state: SweepState) -> Path | None:
    """Writes `montage.png`: samples of the best and the worst trial, at the same noise, one above the other."""
    ranked = sorted(
        ((best[1], r) for r in state.trials.values() if r.status != "failed" and (best := r.best(state.metric))),
        key=lambda pair: pair[0],
    )
    if len(ranked) < 2:
        return None
    tiles = []
    for which, (value, record) in (("best", ranked[0]), ("worst", ranked[-1])):
        step = record.best(state.metric)
        assert step is not None
        picture = state.trial_folder(record.trial_id) / "grids" / f"{step[0]:08d}.png"
        if not picture.exists():
            return None
        caption = f"{which}: {record.trial_id}, step {step[0]}, {state.metric} {value:.4g}"
        tiles.append((caption, Image.open(picture).convert("RGB")))
    width = max(tile.width for _, tile in tiles)
    canvas = Image.new("RGB", (width, sum(tile.height + 18 for _, tile in tiles)), "white")
    top = 0
    for caption, tile in tiles:
        ImageDraw.Draw(canvas).text((4, top + 3), caption, fill="black")
        canvas.paste(tile, (0, top + 18))
        top += tile.height + 18
    path = state.folder / "montage.png"
    canvas.save(path)
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
