"""Reports: what an evaluation found, appended to a file the moment it is known."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dtr_ray.config.errors import ConfigError
from dtr_ray.config.files import needed, parse_json, read_text
from dtr_ray.disk import make_folder_durably, write_durably


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
        """All whole reports, in order; raises ConfigError, naming file and line, where one is damaged."""
        if not self._path.exists():
            return []
        text = read_text(self._path)
        whole = text[: text.rfind("\n") + 1]
        return [self._report(line, f"{self._path}:{n}") for n, line in enumerate(whole.splitlines(), 1)]

    def append(self, report: Report) -> None:
        """Adds a report after those of earlier steps, and waits until the disk has it.

        Reports of the same and later steps go: they are of a run whose checkpoint was lost.
        """
        kept = [known for known in self.read() if known.step < report.step]
        make_folder_durably(self._path.parent)
        write_durably(self._path, "".join(json.dumps(asdict(r)) + "\n" for r in [*kept, report]))

    @staticmethod
    def _report(line: str, where: str) -> Report:
        values = parse_json(line, where, dict)
        needed(values, {"step": int, "metrics": dict, "checkpoint": str, "grid": str}, where)
        unknown = sorted(values.keys() - {each.name for each in fields(Report)})
        if unknown or not all(isinstance(value, (int, float)) for value in values["metrics"].values()):
            raise ConfigError(f"{where} is damaged: it is no report of a trial")
        return Report(**values)


def best_report(reports: list[Report], metric: str) -> Report | None:
    """The trained model's report with the lowest value of `metric`, the first of equals; None without any.

    Reports of a proxy do not have the metric: they are never the best.
    """
    trained = [report for report in reports if report.step > 0 and metric in report.metrics]
    return min(trained, key=lambda report: report.metrics[metric], default=None)
