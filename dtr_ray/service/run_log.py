"""RunLog: turns what happens in a sweep into MLflow records, one run for the sweep and one a trial."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from dtr_ray.config import SweepConfig, flatten
from dtr_ray.service.journal import TrialRecord
from dtr_ray.service.records import RecordWriter
from dtr_ray.service.state import Happening
from dtr_ray.service.tracking import Tracker, default_tracking_uri

_ENDS = {"completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class RunLog:
    """A listener of the sweep's state; everything goes to disk first and is sent in the background."""

    def __init__(self, config: SweepConfig, folder: Path, *, resumed: bool) -> None:
        self._config = config
        self._folder = folder
        self.tracking_uri = config.tracking.uri or default_tracking_uri(folder.parent)
        identity = sweep_identity(folder)
        self._tracker = Tracker(folder, self.tracking_uri, config.tracking.experiment or config.name, identity)
        self._writers: dict[str, RecordWriter] = {}
        tags = {"dtr_ray.kind": "sweep", "dtr_ray.metric": config.objective, **_versions()}
        params = {k: v for k, v in flatten(config.to_dict()).items() if not k.startswith("trial.")}
        self._writer("sweep").start(config.name, tags, params, None)
        if not resumed:
            self._writer("sweep").artifact("sweep.json", "")
        self._tracker.start()

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Records that a trial starts or ends; its own process records its metrics."""
        writer = self._writer(trial.trial_id)
        if happening == "started":
            resolved = self._config.trial_config(trial.params)
            folder = self._folder / "trials" / trial.trial_id
            folder.mkdir(parents=True, exist_ok=True)
            resolved.save(folder / "trial.json")
            tags = {"dtr_ray.kind": "trial", "dtr_ray.trial_id": trial.trial_id, "dtr_ray.status": "running"}
            writer.start(trial.trial_id, tags, flatten(resolved.to_dict()), "sweep")
            writer.artifact(f"trials/{trial.trial_id}/trial.json", "")
        elif happening == "ended":
            tags = {"dtr_ray.status": trial.status, "dtr_ray.reason": trial.reason}
            newest = trial.checkpoints.get(trial.last_step)
            if newest is not None:
                tags["dtr_ray.checkpoint"] = str((self._folder / "trials" / trial.trial_id / newest).resolve())
            writer.tags(tags)
            writer.end(_ENDS[trial.status])

    def end_sweep(self, best: dict[str, Any] | None, montage: Path | None, reason: str | None) -> None:
        """Records the sweep's results on its own run."""
        writer = self._writer("sweep")
        if best is not None:
            writer.tags({"dtr_ray.best_trial": best["trial_id"], "dtr_ray.best_value": str(best["value"])})
            writer.artifact("best.json", "")
        writer.artifact("trials.csv", "")
        if montage is not None:
            writer.artifact(montage.relative_to(self._folder).as_posix(), "")
        writer.tags({"dtr_ray.status": "completed" if reason is None else f"ended: {reason}"})
        writer.end("FINISHED" if reason is None else "KILLED")

    def run_id(self, run_key: str) -> str | None:
        """MLflow's id of a run, or None while the server has not been reached."""
        return self._tracker.run_id(run_key)

    def close(self, timeout_s: float) -> int:
        """Sends what waits, for at most `timeout_s` seconds; returns how many records still wait."""
        for writer in self._writers.values():
            writer.close()
        return self._tracker.close(timeout_s)

    def _writer(self, run_key: str) -> RecordWriter:
        if run_key not in self._writers:
            self._writers[run_key] = RecordWriter(self._folder / "tracking" / run_key / "driver.jsonl")
        return self._writers[run_key]


def sweep_identity(folder: Path) -> str:
    """What tells this sweep's MLflow runs from those of any other: its folder and when it was made."""
    path = folder / "identity"
    if not path.exists():
        import uuid

        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _versions() -> dict[str, str]:
    packages = ("dtr_ray", "torch", "ray", "optuna", "diffusers", "mlflow")
    found = {}
    for name in packages:
        try:
            found[f"env.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit:
        found["mlflow.source.git.commit"] = commit
    return {**found, "env.python": platform.python_version(), "env.host": platform.node()}


def _git_commit() -> str | None:
    """The commit that this code is at, or None outside of a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
