"""FinalLog: the MLflow run of a final training, and its model in the registry."""

import logging
from pathlib import Path
from typing import Any

from dtr_ray.config import TrialConfig, flatten
from dtr_ray.search.provenance import sweep_identity, versions
from dtr_ray.service.best import BestTrial, lineage
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.service.registry import register_model
from dtr_ray.service.tracking import Tracker

log = logging.getLogger(__name__)

RUN_KEY = "best"
_TIMEOUT_S = 60.0


class FinalLog:
    """Keeps records of one final training and sends them; its worker's metrics and grids are among them."""

    def __init__(self, best: BestTrial, config: TrialConfig, folder: Path, trial_folder: Path) -> None:
        """Starts the run, below the sweep's run where MLflow knows it; `folder` holds the records."""
        self._best = best
        self._tracker = Tracker(folder, best.tracking_uri, best.experiment, sweep_identity(folder))
        self._writer = RecordWriter(record_path(folder, RUN_KEY, "driver"))
        self._lineage = _lineage_or_none(best)
        state = {"dtr_ray.status": "running", "dtr_ray.reason": ""}
        tags = {"dtr_ray.kind": "best", "dtr_ray.trial_id": best.trial_id, **state, **versions()}
        self._writer.start(f"best of {best.sweep.name}", tags, flatten(config.to_dict()))
        self._writer.tags(self._lineage_tags())
        self._writer.artifact((trial_folder / "trial.json").relative_to(folder).as_posix())
        self._tracker.start()

    def finish(self, export: Path, metric: str, value: float, protocol: str) -> dict[str, Any]:
        """Ends the run and registers the export; returns the ids and names that MLflow gave them.

        `protocol` is what the value measures, in words.

        Where MLflow does not answer, or does not know the sweep, the model stays unregistered, and `reason`
        says why: a finished training is not lost for that.
        """
        if self._lineage is None:
            self._lineage = _lineage_or_none(self._best)
        tags = {"dtr_ray.status": "completed", "dtr_ray.protocol": protocol}
        self._writer.tags({**tags, **self._lineage_tags()})
        self._writer.end("FINISHED")
        waiting = self._close(_TIMEOUT_S)
        run_id = self._tracker.run_id(RUN_KEY)
        result: dict[str, Any] = {"tracking_uri": self._best.tracking_uri, "run_id": run_id}
        if waiting or run_id is None:
            return result | {"registered": None, "reason": f"MLflow has not taken {waiting} records yet"}
        if self._lineage is None:
            return result | {"registered": None, "reason": "MLflow does not know the sweep's trial"}
        sweep_run_id, trial_run_id = self._lineage
        result |= {"sweep_run_id": sweep_run_id, "trial_run_id": trial_run_id}
        try:
            name, version = register_model(
                self._best.tracking_uri,
                self._best.sweep.tracking.register_as or self._best.sweep.name,
                export,
                sweep_run_id=sweep_run_id,
                trial_run_id=trial_run_id,
                trial_id=self._best.trial_id,
                metric=metric,
                value=value,
                run_id=run_id,
            )
        except Exception as error:  # the server's or the network's: the model itself is safe on disk
            log.warning("the model could not be registered: %s", error)
            return result | {"registered": None, "reason": str(error)}
        return result | {"registered": {"name": name, "version": version}}

    def stop(self, status: str, reason: str) -> None:
        """Ends the run early; a resumed one opens it again."""
        word = "failed" if status == "FAILED" else "interrupted"
        self._writer.tags({"dtr_ray.status": word, "dtr_ray.reason": reason})
        self._writer.end(status)
        self._close(5.0)

    def _close(self, timeout_s: float) -> int:
        self._writer.close()
        return self._tracker.close(timeout_s)

    def _lineage_tags(self) -> dict[str, str]:
        if self._lineage is None:
            return {}
        sweep_run_id, trial_run_id = self._lineage
        return {
            "mlflow.parentRunId": sweep_run_id,
            "dtr_ray.sweep_run_id": sweep_run_id,
            "dtr_ray.trial_run_id": trial_run_id,
        }


def _lineage_or_none(best: BestTrial) -> tuple[str, str] | None:
    try:
        return lineage(best)
    except Exception as error:  # the server's or the network's: training goes on without it
        log.warning("MLflow at %s does not answer: %s", best.tracking_uri, error)
        return None
