"""Reports: what an evaluation found, appended to a file the moment it is known."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial, the unit that a sweep decides by."""

    step: int
    """Training step after which the evaluation was made."""
    metrics: dict[str, float]
    checkpoint: str
    """Checkpoint's folder, relative to the trial's; empty for an untrained model (step 0).

    It exists when the report is yielded; later, that of the best report and the newest one are kept.
    """
    grid: str
    """Sample grid (PNG), relative to the trial's folder."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What the distance measures (`dtr_ray.config.protocol`); empty in reports from before it was kept."""


class ReportFile:
    """The reports of one trial, one JSON object a line; a line torn by a crash counts as never written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Report]:
        """All whole reports, in order."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return [Report(**json.loads(line)) for line in whole.splitlines()]

    def append(self, report: Report) -> None:
        """Adds a report after those of earlier steps, and waits until the disk has it.

        Reports of the same and later steps go: they are of a run whose checkpoint was lost.
        """
        kept = [known for known in self.read() if known.step < report.step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in [*kept, report])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def best_report(reports: list[Report], metric: str) -> Report | None:
    """The trained model's report with the lowest value of `metric`, the first of equals; None without any.

    Reports of a proxy do not have the metric: they are never the best.
    """
    trained = [report for report in reports if report.step > 0 and metric in report.metrics]
    return min(trained, key=lambda report: report.metrics[metric], default=None)
