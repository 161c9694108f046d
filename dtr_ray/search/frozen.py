"""A trial as Optuna keeps it."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.config.space import Choice, Integer, LogUniform, Quantised, Space, Uniform, by_key
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.studies import TRIAL_ID

STATES = {
    "running": TrialState.RUNNING,
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""Optuna's words by ours."""


def frozen_trial(record: TrialRecord, space: Space, evaluation: EvaluationConfig) -> FrozenTrial:
    """A trial as Optuna keeps it: reports by training step, and the best value of a completed one.

    Reports of a proxy are among them: Optuna ranks pruned trials by their last step, and by value only at the
    same step, where all are of one kind. Completed trials are ranked by the full metric.
    """
    params = by_key(space, record.params)
    return optuna.trial.create_trial(
        state=STATES[record.status],
        value=value_of(record, evaluation),
        params=params,
        distributions={key: distribution_of(space[key]) for key in params},
        intermediate_values=figures_of(record, evaluation),
        user_attrs={TRIAL_ID: record.trial_id},
    )


def figures_of(record: TrialRecord, evaluation: EvaluationConfig) -> dict[int, float]:
    """What decides at each training step: the metric, or its proxy."""
    names = {step: evaluation.metric_at(step) for step in record.reports}
    return {step: v[names[step]] for step, v in record.reports.items() if names[step] in v}


def value_of(record: TrialRecord, evaluation: EvaluationConfig) -> float | None:
    """The full metric of a completed trial; Optuna knows the others by their reports."""
    best = record.best(evaluation.metric) if record.status == "completed" else None
    return None if best is None else best[1]


def final_value(record: TrialRecord, evaluation: EvaluationConfig) -> float | None:
    """What Optuna takes for an ended trial's result: of one that was stopped early its last report."""
    if record.status != "pruned":
        return value_of(record, evaluation)
    figures = figures_of(record, evaluation)
    return figures[max(figures)] if figures else None


def distribution_of(parameter: Any) -> optuna.distributions.BaseDistribution:
    """What a parameter of the search space is to Optuna."""
    if isinstance(parameter, Choice):
        return optuna.distributions.CategoricalDistribution(parameter.values)
    if isinstance(parameter, Integer):
        return optuna.distributions.IntDistribution(
            parameter.low, parameter.high, log=parameter.log, step=parameter.step
        )
    assert isinstance(parameter, Uniform | LogUniform | Quantised)
    return optuna.distributions.FloatDistribution(
        parameter.low,
        parameter.high,
        log=isinstance(parameter, LogUniform),
        step=parameter.step if isinstance(parameter, Quantised) else None,
    )
