"""Optuna: it suggests parameters, and keeps a persistent study that mirrors the journal for its own tools.

A suggestion is made from what the journal holds, the seed and the trial's number alone, so a resumed sweep is
suggested what it would have been suggested anyhow, and the database cannot lose a trial.
"""

import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.config.space import (
    Choice,
    Integer,
    LogUniform,
    Quantised,
    Space,
    active_parameters,
    by_key,
)
from dtr_ray.config.sweep import SearchConfig
from dtr_ray.search.database import database_url, reason_of
from dtr_ray.search.frozen import STATES, distribution_of, figures_of, final_value, frozen_trial
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.past import Past
from dtr_ray.search.studies import DATABASE_ERRORS, TRIAL_ID, is_of, is_withdrawn, marked, open_study

log = logging.getLogger(__name__)

_RETRY_S = 60.0


class Suggester:
    """Suggests the parameters of trials."""

    def __init__(self, search: SearchConfig, space: Space, evaluation: EvaluationConfig) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._space = space
        self._past = Past(lambda record: frozen_trial(record, space, evaluation))

    def suggest(self, number: int, trials: dict[str, TrialRecord]) -> dict[str, Any]:
        """Parameters, by dotted name, of trial `number`, which comes after `trials`."""
        points = self._search.points
        return self.suggest_beside((), number, trials, points[number] if number < len(points) else None)

    def suggest_beside(
        self,
        others: Sequence[FrozenTrial],
        number: int,
        trials: dict[str, TrialRecord],
        point: Mapping[str, Any] | None = None,
        salt: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """As `suggest`, with other sweeps' trials of the same space in view.

        `point` is the starting point that the trial takes, if any; `salt` tells draws of one number apart.
        """
        storage = self._past.storage(others, trials.values())
        sampler = self._sampler((number, *salt), point)
        study = optuna.create_study(storage=storage, direction="minimize", sampler=sampler)
        trial = study.ask()
        return active_parameters(self._space, lambda key, parameter: _suggest(trial, key, parameter))

    def _sampler(self, words: tuple[int, ...], point: Mapping[str, Any] | None) -> BaseSampler:
        """A sampler for one trial: seeded by its number, so that no state needs to outlive a crash."""
        seed = int(np.random.SeedSequence([self._search.seed, *words]).generate_state(1)[0])
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
            if point is not None:
                sampler = PartialFixedSampler(by_key(self._space, dict(point)), sampler)
        return sampler


@dataclass
class _Known:
    """What the study knows of a trial."""

    optuna_id: int
    steps: set[int]
    has_ended: bool

    @classmethod
    def of(cls, frozen: FrozenTrial) -> Self:
        """From the study's own answer."""
        steps = set(frozen.intermediate_values)
        return cls(frozen._trial_id, steps, frozen.state != TrialState.RUNNING)


class Mirror:
    """A persistent Optuna study that is told the truth: PRUNED and FAIL are not COMPLETE.

    A database that is away is warned of once, and told everything it has missed when it is back.
    """

    def __init__(
        self,
        name: str,
        storage: str,
        sweep_id: str,
        space: Space,
        evaluation: EvaluationConfig,
        common: dict[str, Any] | None = None,
    ) -> None:
        """Opens or makes the study.

        Args:
            name: the study's.
            storage: the address of its database.
            sweep_id: tells this sweep's trials from those of others.
            space: what is searched.
            evaluation: what decides.
            common: of a study that several sweeps share, what has to be alike in all of them.

        Raises ValueError where it is another sweep's or another search's, or cannot be opened.
        """
        self._space = space
        self._evaluation = evaluation
        self._sweep_id = sweep_id
        self._url = database_url(storage)
        self._known: dict[str, _Known] = {}
        self._away_until = 0.0
        self._is_shared = common is not None
        self.study = open_study(name, storage, sweep_id, common)
        self._learn()

    def _learn(self) -> None:
        """What the study knows of this sweep's trials: to ask at every event would read all that run."""
        for frozen in self.study.get_trials(deepcopy=False):
            if is_of(frozen, self._sweep_id) and not is_withdrawn(frozen):
                self._known[frozen.user_attrs.get(TRIAL_ID, "")] = _Known.of(frozen)

    def update(self, trials: dict[str, TrialRecord], record: TrialRecord | None = None) -> None:
        """Tells the study of one trial; or of all, which it is told too when its database is back."""
        if record is not None and time.monotonic() < self._away_until:
            return
        try:
            if self._away_until:
                # What it was last told may have arrived, or not.
                self._learn()
            for each in trials.values() if record is None or self._away_until else [record]:
                self._tell(each)
            self._away_until = 0.0
        except DATABASE_ERRORS as error:
            if not self._away_until:
                reason = reason_of(error, self._url)
                log.warning("the Optuna study lags behind, its database is away: %s", reason)
            # Optuna tries for many seconds by itself.
            self._away_until = time.monotonic() + _RETRY_S

    def catch_up(self, trials: dict[str, TrialRecord]) -> None:
        """Tells the study what it has missed, if its database was away."""
        if self._away_until:
            self.update(trials)

    def _tell(self, record: TrialRecord) -> None:
        if record.trial_id not in self._known and self._is_shared:
            # It was claimed there.
            self._learn()
        known, storage = self._known.get(record.trial_id) or self._add(record), self.study._storage
        if known.has_ended:
            return
        for step, value in sorted(figures_of(record, self._evaluation).items()):
            if step not in known.steps:
                storage.set_trial_intermediate_value(known.optuna_id, step, value)
                known.steps.add(step)
        if record.status != "running":
            storage.set_trial_user_attr(known.optuna_id, "reason", record.reason)
            storage.set_trial_user_attr(known.optuna_id, "reports", json.dumps(record.reports))
            # `Study.tell` would read the trial twice, to find what is known here.
            result = final_value(record, self._evaluation)
            values = None if result is None else [result]
            storage.set_trial_state_values(known.optuna_id, STATES[record.status], values)
            known.has_ended = True

    def _add(self, record: TrialRecord) -> _Known:
        running = TrialRecord(record.trial_id, record.number, record.params)
        frozen = marked(frozen_trial(running, self._space, self._evaluation), self._sweep_id)
        storage = self.study._storage
        optuna_id = storage.create_new_trial(self.study._study_id, template_trial=frozen)
        known = self._known[record.trial_id] = _Known(optuna_id, set(), has_ended=False)
        return known


def importances(
    records: list[TrialRecord], space: Space, evaluation: EvaluationConfig
) -> tuple[int, dict[str, float]]:
    """How much each parameter matters for the figure at the first step that all trials have reported.

    Early stopping leaves few complete trials, all of them good; at their first common step all trials that
    have a figure can be compared, of the proxy where that step has one. Returns (step, importance by
    parameter); empty where there are too few trials to tell.
    """
    figures = {r.number: {s: v for s, v in figures_of(r, evaluation).items() if s} for r in records}
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
    distributions = {key: distribution_of(space[key]) for key in params}
    return optuna.trial.create_trial(value=value, params=params, distributions=distributions)


def _suggest(trial: optuna.Trial, name: str, parameter: Any) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.values)
    if isinstance(parameter, Integer):
        return trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)
    step = parameter.step if isinstance(parameter, Quantised) else None
    log = isinstance(parameter, LogUniform)
    return trial.suggest_float(name, parameter.low, parameter.high, step=step, log=log)
