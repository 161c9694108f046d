"""Reports: what an evaluation found, appended to a file the moment it is known."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial, the unit that a sweep decides by."""

    step: int
    """Training step after which the evaluation was made."""
    metrics: dict[str, float]
    checkpoint: str
    """Checkpoint's folder, relative to the trial's; empty for an untrained model (step 0)."""
    grid: str
    """Sample grid (PNG), relative to the trial's folder."""


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
        """Adds a report and waits until the disk has it."""
        known = self.read()
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in [*known, report])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
