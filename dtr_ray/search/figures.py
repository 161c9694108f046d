"""Tally: what a sweep asks about all of its trials at every event, kept up to date trial by trial."""

import heapq
from collections import defaultdict

from dtr_ray.search.journal import Status, TrialRecord

Best = tuple[TrialRecord, int, float]


class Tally:
    """Sums over the trials of a sweep: thousands are too many to go through at every report.

    One thread updates it, others may read it meanwhile.
    """

    def __init__(self, metric: str) -> None:
        self.best: Best | None = None
        """(trial, step, value) of the smallest value of the metric among trials that did not fail."""
        self.seconds = 0.0
        """Those that all trials have held their resources for."""
        self.steps = 0
        """Training steps of all trials, as of their last reports."""
        self._metric = metric
        self._trials: dict[str, dict[str, TrialRecord]] = defaultdict(dict)
        self._seen: dict[str, tuple[str, float, int]] = {}
        self._bests: dict[str, tuple[int, float] | None] = {}
        self._ranking: list[tuple[float, int, int, TrialRecord]] = []
        """A heap of the best values; of those that no longer hold only the first is sure to be gone."""

    def count(self, status: Status) -> int:
        """How many trials have a status."""
        return len(self._trials[status]) if status in self._trials else 0

    def trials(self, status: Status) -> list[TrialRecord]:
        """Those that have a status, by their numbers."""
        found = list(self._trials[status].values()) if status in self._trials else []
        return sorted(found, key=lambda trial: trial.number)

    def update(self, trial: TrialRecord) -> None:
        """Takes a trial that is new or has changed."""
        status, wall_s, steps = self._seen.get(trial.trial_id, ("", 0.0, 0))
        if trial.status != status:
            self._trials[trial.status][trial.trial_id] = trial
            if status:
                del self._trials[status][trial.trial_id]
        self.seconds += trial.wall_s - wall_s
        self.steps += trial.last_step - steps
        self._seen[trial.trial_id] = trial.status, trial.wall_s, trial.last_step
        best = self._best_of(trial)
        if best != self._bests.get(trial.trial_id):
            self._bests[trial.trial_id] = best
            if best is not None:
                heapq.heappush(self._ranking, (best[1], trial.number, best[0], trial))
            while self._ranking and not self._holds(*self._ranking[0]):
                heapq.heappop(self._ranking)
            first = self._ranking[0] if self._ranking else None
            self.best = None if first is None else (first[3], first[2], first[0])

    def _best_of(self, trial: TrialRecord) -> tuple[int, float] | None:
        return None if trial.status == "failed" else trial.best(self._metric)

    def _holds(self, value: float, _: int, step: int, trial: TrialRecord) -> bool:
        return self._bests[trial.trial_id] == (step, value)
