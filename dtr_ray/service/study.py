"""Optuna: it suggests parameters, and keeps a persistent study that mirrors the journal for its own tools.

A suggestion is made from what the journal holds, the seed and the trial's number alone, so a resumed sweep is
suggested what it would have been suggested anyhow, and the database cannot lose a trial.
"""

import json
import logging
import re
import time
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.config.space import (
    Choice,
    Integer,
    LogUniform,
    Quantised,
    Space,
    Uniform,
    active_parameters,
    by_key,
)
from dtr_ray.config.sweep import SearchConfig
from dtr_ray.service.journal import TrialRecord

log = logging.getLogger(__name__)

_ID, _SWEEP_ID = "dtr_ray.trial_id", "dtr_ray.sweep_id"
_STATES = {
    "running": TrialState.RUNNING,
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_RETRY_S = 60.0
_DATABASE_ERRORS = (optuna.exceptions.OptunaError, SQLAlchemyError)


class Suggester:
    """Suggests the parameters of trials."""

    def __init__(self, search: SearchConfig, space: Space, evaluation: EvaluationConfig) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._space = space
        self._evaluation = evaluation

    def suggest(self, number: int, trials: dict[str, TrialRecord]) -> dict[str, Any]:
        """Parameters, by dotted name, of trial `number`, which comes after `trials`."""
        study = optuna.create_study(direction="minimize", sampler=self._sampler(number))
        study.add_trials([frozen_trial(r, self._space, self._evaluation) for r in trials.values()])
        trial = study.ask()
        return active_parameters(self._space, lambda key, parameter: _suggest(trial, key, parameter))

    def _sampler(self, number: int) -> BaseSampler:
        """A sampler for one trial: seeded by its number, so that no state needs to outlive a crash."""
        seed = int(np.random.SeedSequence([self._search.seed, number]).generate_state(1)[0])
        sampler: BaseSampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._search.sampler != "tpe":
                sampler = RandomSampler(seed=seed)
            else:
                sampler = TPESampler(
                    seed=seed,
                    n_startup_trials=self._search.num_startup_trials,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            points = self._search.points
            if number < len(points):
                sampler = PartialFixedSampler(by_key(self._space, dict(points[number])), sampler)
        return sampler


class Mirror:
    """A persistent Optuna study that is told the truth: PRUNED and FAIL are not COMPLETE.

    A database that is away is warned of once, and told everything it has missed when it is back.
    """

    def __init__(
        self, name: str, storage: str, sweep_id: str, space: Space, evaluation: EvaluationConfig
    ) -> None:
        """Opens or makes the study; raises ValueError where it is another sweep's, or cannot be opened."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._evaluation = evaluation
        self._numbers: dict[str, int] = {}
        self._away_until = 0.0
        try:
            self.study = optuna.create_study(
                study_name=name, storage=storage, direction="minimize", load_if_exists=True
            )
            owner = self.study.user_attrs.get(_SWEEP_ID)
            if owner is None:
                self.study.set_user_attr(_SWEEP_ID, sweep_id)
            for frozen in self.study.get_trials(deepcopy=False):
                self._numbers[frozen.user_attrs.get(_ID, "")] = frozen.number
        except (*_DATABASE_ERRORS, ImportError) as error:
            shown = re.sub(r"//[^/@\s]*@", "//", f"{storage}: {error}")
            raise ValueError(f"the Optuna study cannot be opened at {shown}") from error
        if owner not in (None, sweep_id):
            raise ValueError(
                f"the study {name!r} in that database is another sweep's: give this one another name, "
                "or storage.study another database"
            )

    def update(self, trials: dict[str, TrialRecord], record: TrialRecord | None = None) -> None:
        """Tells the study of one trial; or of all, which it is told too when its database is back."""
        if record is not None and time.monotonic() < self._away_until:
            return
        try:
            for each in trials.values() if record is None or self._away_until else [record]:
                self._tell(each)
            self._away_until = 0.0
        except _DATABASE_ERRORS as error:
            if not self._away_until:
                log.warning("the Optuna study lags behind, its database is away: %s", error)
            # Optuna tries for many seconds by itself.
            self._away_until = time.monotonic() + _RETRY_S

    def catch_up(self, trials: dict[str, TrialRecord]) -> None:
        """Tells the study what it has missed, if its database was away."""
        if self._away_until:
            self.update(trials)

    def _tell(self, record: TrialRecord) -> None:
        number = self._numbers.get(record.trial_id)
        if number is None:
            running = TrialRecord(record.trial_id, record.number, record.params)
            self.study.add_trial(frozen_trial(running, self._space, self._evaluation))
            number = self.study.get_trials(deepcopy=False)[-1].number
            self._numbers[record.trial_id] = number
        frozen = self.study.get_trials(deepcopy=False)[number]
        if frozen.state != TrialState.RUNNING:
            return
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        for step, value in sorted(_figures(record, self._evaluation).items()):
            if step not in frozen.intermediate_values:
                trial.report(value, step)
        if record.status != "running":
            trial.set_user_attr("reason", record.reason)
            trial.set_user_attr("reports", json.dumps(record.reports))
            state = _STATES[record.status]
            self.study.tell(number, _value(record, self._evaluation), state=state)


def frozen_trial(record: TrialRecord, space: Space, evaluation: EvaluationConfig) -> FrozenTrial:
    """A trial as Optuna keeps it: reports by training step, and the best value of a completed one.

    Reports of a proxy are among them: Optuna ranks pruned trials by their last step, and by value only at the
    same step, where all are of one kind. Completed trials are ranked by the full metric.
    """
    params = by_key(space, record.params)
    return optuna.trial.create_trial(
        state=_STATES[record.status],
        value=_value(record, evaluation),
        params=params,
        distributions={key: _distribution(space[key]) for key in params},
        intermediate_values=_figures(record, evaluation),
        user_attrs={_ID: record.trial_id},
    )


def importances(
    records: list[TrialRecord], space: Space, evaluation: EvaluationConfig
) -> tuple[int, dict[str, float]]:
    """How much each parameter matters for the figure at the first step that all trials have reported.

    Early stopping leaves few complete trials, all of them good; at their first common step all trials that
    have a figure can be compared, of the proxy where that step has one. Returns (step, importance by
    parameter); empty where there are too few trials to tell.
    """
    figures = {r.number: {s: v for s, v in _figures(r, evaluation).items() if s} for r in records}
    records = [record for record in records if figures[record.number]]
    common = set.intersection(*(set(figures[record.number]) for record in records)) if records else set()
    if len(records) < 4 or not common:
        return 0, {}
    step = min(common)
    study = optuna.create_study(direction="minimize")
    for record in records:
        study.add_trial(_completed(record, space, figures[record.number][step]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return step, optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:
            log.debug("no importances: %s", error)
            return step, {}


def _completed(record: TrialRecord, space: Space, value: float) -> FrozenTrial:
    params = by_key(space, record.params)
    distributions = {key: _distribution(space[key]) for key in params}
    return optuna.trial.create_trial(value=value, params=params, distributions=distributions)


def _figures(record: TrialRecord, evaluation: EvaluationConfig) -> dict[int, float]:
    """What decides at each training step: the metric, or its proxy."""
    names = {step: evaluation.metric_at(step) for step in record.reports}
    return {step: v[names[step]] for step, v in record.reports.items() if names[step] in v}


def _value(record: TrialRecord, evaluation: EvaluationConfig) -> float | None:
    """The full metric of a completed trial; Optuna knows the others by their reports."""
    best = record.best(evaluation.metric) if record.status == "completed" else None
    return None if best is None else best[1]


def _distribution(parameter: Any) -> optuna.distributions.BaseDistribution:
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


def _suggest(trial: optuna.Trial, name: str, parameter: Any) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.values)
    if isinstance(parameter, Integer):
        return trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)
    step = parameter.step if isinstance(parameter, Quantised) else None
    log = isinstance(parameter, LogUniform)
    return trial.suggest_float(name, parameter.low, parameter.high, step=step, log=log)
