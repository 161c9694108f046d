"""RunLog: turns what happens in a sweep into MLflow records, one run for the sweep and one a trial."""

import time
from pathlib import Path
from typing import Any

from dtr_ray.config import SweepConfig, TrialConfig, flatten
from dtr_ray.config.protocol import describe
from dtr_ray.disk import make_folder_durably, with_room
from dtr_ray.search.database import public
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.provenance import sweep_identity, versions
from dtr_ray.search.state import Happening, SweepState
from dtr_ray.service.records import RecordWriter, read_lines, record_path
from dtr_ray.service.tracking import Tracker, default_tracking_uri
from dtr_ray.storage.address import is_url, joined, results_root

_ENDS = {"completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_SWEEP, _CONFIG = "sweep", "trial.json"
# A place that has taken nothing for so long is given up when the sweep ends.
_PATIENCE_S = 10.0
_SQLITE_PATIENCE_S = 60.0


class RunLog:
    """A listener of the sweep's state; everything goes to disk first and is sent in the background."""

    def __init__(self, config: SweepConfig, folder: Path, state: SweepState) -> None:
        self._config = config
        self._folder, self._state = folder, state
        root = results_root(config.storage.output, folder)
        self.tracking_uri = config.tracking.uri or default_tracking_uri(root)
        self._tracker = self._new_tracker()
        self._writers: dict[str, RecordWriter] = {}
        self._versions = versions() | {"dtr_ray.protocol": describe(state.protocol)}
        if not state.done_before:
            tags = {"dtr_ray.kind": "sweep", "dtr_ray.metric": config.objective, "dtr_ray.status": "running"}
            params = {k: v for k, v in flatten(public(config)).items() if not k.startswith("trial.")}
            self._writer(_SWEEP).start(config.name, {**tags, **self._versions}, params, None)
            self._writer(_SWEEP).artifact("sweep.json")
        for trial in state.trials.values():
            if not (folder / "trials" / trial.trial_id / _CONFIG).exists():
                # The sweep goes on from a store, on another machine.
                self._write_config(trial)
            if trial.status != "running" and not self._has_ended(trial):
                # The process was killed right after the journal had it.
                if not self._has_started(trial):
                    self._start(trial)
                self("ended", trial)
        if self._tracker.pending() or state.done_before:
            # It finds out, too, whether MLflow has lost what it had.
            self._tracker.start()

    def __call__(self, happening: Happening, trial: TrialRecord) -> None:
        """Records that a trial starts or ends; its own process records its metrics."""
        if happening == "started":
            self._start(trial)
        elif happening == "retried":
            retried = {"dtr_ray.retries": trial.retries, "dtr_ray.moves": trial.moves}
            self._writer(trial.trial_id).tags({**retried, "dtr_ray.retry_reason": trial.retry_reason})
        elif happening == "ended":
            writer = self._writer(trial.trial_id)
            writer.tags(
                {"dtr_ray.status": trial.status, "dtr_ray.reason": trial.reason} | self._checkpoint(trial)
            )
            writer.end(_ENDS[trial.status])
            with_room(self._folder, writer.settle)
            if not writer.num_waiting:
                # Else a long sweep runs out of file descriptors.
                self._writers.pop(trial.trial_id).close()

    def end_sweep(
        self, best: dict[str, Any] | None, montage: Path | None, reason: str | None, *, is_error: bool
    ) -> None:
        """Records the sweep's results on its own run; `reason` says why it ended early, if it did."""
        writer = self._writer(_SWEEP)
        if best is not None:
            writer.tags({"dtr_ray.best_trial": best["trial_id"], "dtr_ray.best_value": best["value"]})
            writer.artifact("best.json")
        writer.artifact("trials.csv")
        if montage is not None:
            writer.artifact(montage.relative_to(self._folder).as_posix())
        stopped = reason is not None and is_error
        writer.tags({"dtr_ray.status": "stopped" if stopped else "completed", "dtr_ray.reason": reason or ""})
        writer.end("KILLED" if stopped else "FINISHED")

    def interrupted(self, error: BaseException) -> None:
        """Records that the sweep was left before its end."""
        writer = self._writer(_SWEEP)
        reason = "" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        writer.tags({"dtr_ray.status": "interrupted", "dtr_ray.reason": reason})
        writer.end("KILLED")

    def records_waiting(self) -> int:
        """Records on disk that MLflow has not taken yet."""
        return self._tracker.pending()

    def run_id(self, run_key: str) -> str | None:
        """MLflow's id of a run, or None while the server has not been reached."""
        return self._tracker.run_id(run_key)

    def close(self, timeout_s: float) -> int:
        """Sends what waits, for `timeout_s` seconds at most, and no longer to a place that takes nothing.

        Returns how many records still wait.
        """
        for writer in self._writers.values():
            writer.close()
        end = time.monotonic() + timeout_s
        patience_s = _SQLITE_PATIENCE_S if self.tracking_uri.startswith("sqlite:") else _PATIENCE_S
        if self._state.done_before:
            self._tracker.close(min(patience_s, timeout_s))
            self._tracker = self._new_tracker()
        before, waiting = None, self._tracker.pending()
        while waiting and (before is None or waiting < before) and time.monotonic() < end:
            if before is not None:
                self._tracker = self._new_tracker()
            self._tracker.start()
            before, waiting = waiting, self._tracker.close(min(patience_s, end - time.monotonic()))
        return waiting

    def _new_tracker(self) -> Tracker:
        experiment = self._config.tracking.experiment or self._config.name
        return Tracker(self._folder, self.tracking_uri, experiment, sweep_identity(self._folder))

    def _writer(self, run_key: str) -> RecordWriter:
        if run_key not in self._writers:
            self._writers[run_key] = RecordWriter(record_path(self._folder, run_key, "driver"))
        return self._writers[run_key]

    def _start(self, trial: TrialRecord) -> None:
        resolved = self._write_config(trial)
        tags = {"dtr_ray.kind": "trial", "dtr_ray.trial_id": trial.trial_id, "dtr_ray.status": "running"}
        writer = self._writer(trial.trial_id)
        writer.start(trial.trial_id, {**self._versions, **tags}, flatten(resolved.to_dict()), _SWEEP)
        writer.artifact(f"trials/{trial.trial_id}/{_CONFIG}")
        with_room(self._folder, writer.settle)

    def _write_config(self, trial: TrialRecord) -> TrialConfig:
        """The trial's resolved configuration, which is written into its folder, too."""
        resolved = self._config.trial_config(trial.params)
        folder = self._folder / "trials" / trial.trial_id
        make_folder_durably(folder)
        resolved.save(folder / _CONFIG)
        return resolved

    def _has_started(self, trial: TrialRecord) -> bool:
        lines = read_lines(record_path(self._folder, trial.trial_id, "driver"), 0)
        return any(line.record is not None and line.record["kind"] == "start" for line in lines)

    def _has_ended(self, trial: TrialRecord) -> bool:
        lines = read_lines(record_path(self._folder, trial.trial_id, "driver"), 0)
        return bool(lines) and lines[-1].record is not None and lines[-1].record["kind"] == "end"

    def _checkpoint(self, trial: TrialRecord) -> dict[str, str]:
        """The place of the best report's checkpoint; else of the newest."""
        best = trial.best(self._config.objective)
        found = trial.checkpoints.get(trial.last_step if best is None else best[0])
        if not found:
            return {}
        output = self._config.storage.output
        if is_url(output):
            place = joined(output, self._config.name, "trials", trial.trial_id, found)
        else:
            place = str((self._folder / "trials" / trial.trial_id / found).resolve())
        return {"dtr_ray.checkpoint": place}
