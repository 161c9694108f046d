"""Figures: what trials have reported, gathered anew only from those that have reported since."""

from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.search.journal import TrialRecord

Best = tuple[int, float] | None


class Figures:
    """Every trial's deciding figures and its best one: a sweep asks for all trials' at every report."""

    def __init__(self, evaluation: EvaluationConfig, metric: str) -> None:
        self._evaluation, self._metric = evaluation, metric
        self._histories: dict[str, tuple[int, dict[int, float]]] = {}
        self._bests: dict[str, tuple[int, Best]] = {}

    def history(self, trial: TrialRecord) -> dict[int, float]:
        """What decides by training step, the metric or its proxy; without step 0. Not to be changed."""
        kept = self._histories.get(trial.trial_id)
        if kept is None or kept[0] != len(trial.reports):
            found = {step: v[self._evaluation.metric_at(step)] for step, v in trial.reports.items() if step}
            kept = self._histories[trial.trial_id] = (len(trial.reports), found)
        return kept[1]

    def best(self, trial: TrialRecord) -> Best:
        """(step, value) as `TrialRecord.best` of the sweep's metric."""
        kept = self._bests.get(trial.trial_id)
        if kept is None or kept[0] != len(trial.reports):
            kept = self._bests[trial.trial_id] = (len(trial.reports), trial.best(self._metric))
        return kept[1]
