"""Opening Optuna studies, of one sweep or of several, and telling whose a trial is."""

import json
import random
import time
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from dtr_ray.config import flatten
from dtr_ray.config.errors import shown
from dtr_ray.search.database import check_database, database_url, engine_options, reason_of, without_password

TRIAL_ID, SWEEP_ID = "dtr_ray.trial_id", "dtr_ray.sweep_id"
_COMMON, _WITHDRAWN = "dtr_ray.common", "dtr_ray.withdrawn"
_MAX_SHOWN = 3
# KeyError is Optuna's word for a study that the database does not have any more.
DATABASE_ERRORS = (optuna.exceptions.OptunaError, SQLAlchemyError, KeyError)
_OPENING_TRIES = 6


def open_study(name: str, address: str, sweep_id: str, common: dict[str, Any] | None) -> optuna.Study:
    """Opens or makes a study; `common` as in `Mirror`.

    Raises ValueError, in one line and without the address's password, where that cannot be.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_study(address)
    try:
        study = _opened(name, address)
        if common is None:
            _own(study, name, sweep_id)
        else:
            _join(study, name, common)
    except (*DATABASE_ERRORS, ImportError) as error:
        reason = reason_of(error, database_url(address))
        raise ValueError(
            f"the Optuna study cannot be opened at {without_password(address)}: {reason}"
        ) from None
    return study


def check_study(address: str) -> None:
    """Asks the study's database a question; raises ValueError, as `open_study`, where it gives no answer."""
    try:
        check_database(address)
    except ValueError as error:
        raise ValueError(f"the Optuna study cannot be opened: {error}") from None


def _opened(name: str, address: str) -> optuna.Study:
    """A study and its tables; sweeps that start side by side may make them at the same moment."""
    url = database_url(address)
    for tries_left in reversed(range(_OPENING_TRIES)):
        try:
            storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_options(url))
            return optuna.create_study(
                study_name=name, storage=storage, direction="minimize", load_if_exists=True
            )
        except DATABASE_ERRORS:
            if not tries_left:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


def _own(study: optuna.Study, name: str, sweep_id: str) -> None:
    owner = study.user_attrs.get(SWEEP_ID)
    if _COMMON in study.user_attrs or owner not in (None, sweep_id):
        raise ValueError(
            f"the study {name!r} in that database is another sweep's: give this one another name, or "
            "storage.study another database; or let both share a study (storage.study_name)"
        )
    if owner is None:
        study.set_user_attr(SWEEP_ID, sweep_id)


def _join(study: optuna.Study, name: str, common: dict[str, Any]) -> None:
    if SWEEP_ID in study.user_attrs:
        raise ValueError(
            f"the study {name!r} in that database is one sweep's own: give storage.study_name another"
        )
    known = study.user_attrs.get(_COMMON)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(
                f"the study {name!r} in that database is not of this program: give storage.study_name another"
            )
        study.set_user_attr(_COMMON, json.dumps(common))
        # Another sweep may have said so at the same moment; the later word stands.
        known = study.user_attrs[_COMMON]
    before, now = flatten(json.loads(known)), flatten(json.loads(json.dumps(common)))
    found = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
    if found:
        texts = [
            f"{key} is {shown(now.get(key))}, not {shown(before.get(key))}" for key in found[:_MAX_SHOWN]
        ]
        raise ValueError(
            f"the study {name!r} is of another search ({'; '.join(texts)}): its trials could not be "
            "compared; give storage.study_name another"
        )


def marked(trial: FrozenTrial, sweep_id: str) -> FrozenTrial:
    """The trial with the mark of its sweep."""
    trial.set_user_attr(SWEEP_ID, sweep_id)
    return trial


def is_of(trial: FrozenTrial, sweep_id: str) -> bool:
    """Whether a trial is this sweep's; those without a mark are of a study with one sweep."""
    return bool(trial.user_attrs.get(SWEEP_ID, sweep_id) == sweep_id)


def is_withdrawn(trial: FrozenTrial) -> bool:
    """Whether a trial was given up before it began, since another sweep had the same parameters."""
    return _WITHDRAWN in trial.user_attrs


def withdraw(study: optuna.Study, trial: FrozenTrial) -> None:
    """Gives up a trial that has not begun; the study keeps it as failed."""
    study._storage.set_trial_user_attr(trial._trial_id, _WITHDRAWN, True)
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
