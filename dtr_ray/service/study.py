"""The Optuna study of a sweep: it suggests parameters, and mirrors the journal for Optuna's own tools."""

import json
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from dtr_ray.config.space import Choice, Integer, LogUniform, Quantised, Space, Uniform
from dtr_ray.config.sweep import SearchConfig
from dtr_ray.service.journal import TrialRecord

_ID = "dtr_ray.trial_id"
_STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """A persistent Optuna study that is told the truth: PRUNED and FAIL are not COMPLETE."""

    def __init__(self, name: str, storage: str, search: SearchConfig, space: Space, metric: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._space = space
        self._metric = metric
        self.study = optuna.create_study(
            study_name=name, storage=storage, direction="minimize", load_if_exists=True
        )

    def suggest(self, number: int, trial_id: str) -> dict[str, Any]:
        """Parameters of the sweep's trial `number`, which depend on the seed, the number and the study alone."""
        self.study.sampler = self._sampler(number)
        trial = self.study.ask()
        trial.set_user_attr(_ID, trial_id)
        params: dict[str, Any] = {}
        for name, parameter in active(self._space):
            if parameter.exists(params):
                params[name] = _suggest(trial, name, parameter)
        return params

    def _sampler(self, number: int) -> BaseSampler:
        """A sampler for one trial: seeded by its number, so that no state needs to outlive a crash."""
        seed = int(np.random.SeedSequence([self._search.seed, number]).generate_state(1)[0])
        sampler: BaseSampler
        if self._search.sampler == "random":
            sampler = RandomSampler(seed=seed)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = TPESampler(
                    seed=seed,
                    n_startup_trials=self._search.num_startup_trials,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
        points = self._search.starting_points
        if number < len(points):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = PartialFixedSampler(dict(points[number]), sampler)
        return sampler

    def reconcile(self, trials: dict[str, TrialRecord]) -> None:
        """Brings the study in line with the journal, after a crash between the two."""
        seen = {}
        for frozen in self.study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get(_ID)
            if trial_id in trials and trial_id not in seen and frozen.state != TrialState.FAIL:
                seen[trial_id] = frozen
            elif trial_id in trials and trials[trial_id].status == "failed":
                seen.setdefault(trial_id, frozen)
            elif frozen.state == TrialState.RUNNING:
                # Asked for, but lost before the journal had it: it never was a trial of the sweep.
                self.study.tell(frozen.number, state=TrialState.FAIL)
        for trial_id, record in trials.items():
            if trial_id not in seen:
                raise ValueError(f"the study {self.study.study_name!r} lacks trial {trial_id}, which the sweep has run")
            self.update(record)

    def update(self, record: TrialRecord) -> None:
        """Tells the study what a trial has reported, and how it ended."""
        frozen = self._find(record.trial_id)
        if frozen.state != TrialState.RUNNING:
            return
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        for step, values in sorted(record.reports.items()):
            if step not in frozen.intermediate_values and self._metric in values:
                trial.report(values[self._metric], step)
        if record.status == "running":
            return
        trial.set_user_attr("reason", record.reason)
        trial.set_user_attr("reports", json.dumps(record.reports))
        best = record.best(self._metric)
        state = _STATES[record.status]
        if state == TrialState.COMPLETE and best is not None:
            self.study.tell(frozen.number, best[1])
        else:
            self.study.tell(frozen.number, state=state)

    def _find(self, trial_id: str) -> optuna.trial.FrozenTrial:
        found = [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get(_ID) == trial_id]
        return next((t for t in found if t.state == TrialState.RUNNING), found[-1])


def active(space: Space) -> list[tuple[str, Any]]:
    """The searched parameters, each after those that its condition names."""
    from dtr_ray.config.space import ordered

    return [(name, space[name]) for name in ordered(space)]


def importances(records: list[TrialRecord], space: Space, metric: str) -> tuple[int, dict[str, float]]:
    """How much each parameter matters for the value at the first step that all these trials have reported.

    Early stopping leaves few complete trials, all of them good; at their first common step all trials can
    be compared. Returns (step, importance by parameter); empty where there are too few trials to tell.
    """
    common = set.intersection(*(set(r.reports) for r in records)) if records else set()
    if len(records) < 4 or not common:
        return 0, {}
    step = min(common)
    distributions = {name: _distribution(parameter) for name, parameter in space.items()}
    study = optuna.create_study(direction="minimize")
    for record in records:
        study.add_trial(
            optuna.trial.create_trial(
                params=record.params,
                distributions={name: distributions[name] for name in record.params},
                value=record.reports[step][metric],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return step, optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):
            return step, {}


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
