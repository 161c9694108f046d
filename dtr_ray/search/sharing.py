"""SharedSearch: several sweeps search one space in one study, and none repeats another's trial.

A sweep draws parameters with all trials of the study in view (those that run count as bad ones, so that the
sampler keeps away from them), from a random stream of its own. It then claims them: it adds a running trial,
and looks at the study again. Optuna numbers trials one after the other under a lock, so of two sweeps that
claimed the same at once exactly one sees the other's claim before its own: it withdraws, and draws again.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from dtr_ray.config import SweepConfig, flatten
from dtr_ray.config.protocol import Protocol
from dtr_ray.config.space import by_key, target
from dtr_ray.search.database import database_url, reason_of, study_url
from dtr_ray.search.frozen import frozen_trial
from dtr_ray.search.journal import TrialRecord
from dtr_ray.search.studies import DATABASE_ERRORS, TRIAL_ID, is_of, is_withdrawn, marked, withdraw
from dtr_ray.search.study import Mirror, Suggester

log = logging.getLogger(__name__)

Params = dict[str, Any]
_MAX_DRAWS = 500
# Then the sampler draws without a look at what has been, which is quick and leaves nothing out.
_MODEL_DRAWS = 20
_RETRY_S = 5.0
_PATIENCE_S = 600.0


class SharedSearch:
    """What one sweep runs next, in a study that it shares.

    Args:
        config: the sweep; its `storage.study_name` names the study.
        study: the opened study.
        sweep_id: tells this sweep's trials from the others'.
        suggester: draws parameters.
        retry_s: seconds between two tries while the database is away.
        patience_s: after so many seconds without its database the sweep draws without it, so that no machine
            idles for long; it may then repeat another's trial, if at all, only in a space without ranges.
    """

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        sweep_id: str,
        suggester: Suggester,
        *,
        retry_s: float = _RETRY_S,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        assert config.storage.study is not None
        self._config, self._study, self._sweep_id, self._suggester = config, study, sweep_id, suggester
        self._url = database_url(config.storage.study)
        self._stream = int(sweep_id[:8], 16)
        self._retry_s, self._patience_s = retry_s, patience_s
        self._away_since: float | None = None
        self._next_try = 0.0
        self._seen: list[FrozenTrial] = []
        self._claimed: tuple[str, Params] | None = None

    def next_params(
        self, trial_id: str, number: int, trials: Mapping[str, TrialRecord]
    ) -> Params | Literal["wait", "finished"]:
        """Parameters of the sweep's trial `number`, which no sweep of the study has run or runs.

        "wait" while the database is away; "finished" where no draw finds anything new.
        """
        now = time.monotonic()
        if now < self._next_try:
            return "wait"
        try:
            found = self._claim(trial_id, number, trials)
        except DATABASE_ERRORS as error:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                log.warning(
                    "new trials wait for the study's database, which is away: %s", reason_of(error, self._url)
                )
            if now - self._away_since < self._patience_s:
                self._next_try = now + self._retry_s
                return "wait"
            log.warning("%s starts without the study's database, which has been away for long", trial_id)
            if self._claimed is not None and self._claimed[0] == trial_id:
                # The database may have it.
                return self._claimed[1]
            return self._draw(number, trials, self._seen) or "finished"
        if self._away_since is not None:
            log.warning("the study's database is back: new trials start again")
            self._away_since = None
        if found is None:
            log.warning("no new trial is left: the sweeps of study %r have run all that is in the space",
                        self._study.study_name)  # fmt: skip
            return "finished"
        return found

    def _claim(self, trial_id: str, number: int, trials: Mapping[str, TrialRecord]) -> Params | None:
        """Parameters that are this sweep's alone; those of a claim that a crash has cut off come first."""
        for attempt in range(_MAX_DRAWS):
            self._seen = [t for t in self._study.get_trials(deepcopy=False) if not is_withdrawn(t)]
            mine = [t for t in self._seen if is_of(t, self._sweep_id) and t.user_attrs[TRIAL_ID] == trial_id]
            if not mine:
                params = self._draw(number, trials, self._seen, attempt)
                if params is None:
                    return None
                self._claimed = trial_id, params
                claim = TrialRecord(trial_id, number, params)
                frozen = frozen_trial(claim, self._config.space, self._config.trial.evaluation)
                self._study.add_trial(marked(frozen, self._sweep_id))
                continue
            before = [t for t in self._seen if t.number < mine[0].number]
            if not _is_among(mine[0].params, before):
                return {target(key): value for key, value in mine[0].params.items()}
            self._claimed = None
            withdraw(self._study, mine[0])
        return None

    def _draw(
        self, number: int, trials: Mapping[str, TrialRecord], seen: Sequence[FrozenTrial], attempt: int = 0
    ) -> Params | None:
        """Parameters that no known trial has; None where there are none."""
        space, search = self._config.space, self._config.search
        own = [frozen_trial(t, space, self._config.trial.evaluation) for t in trials.values()]
        others = [t for t in seen if not is_of(t, self._sweep_id)]
        taken = [*others, *own]
        point = self._free_point(taken)
        if point is None and search.sampler == "points":
            return None
        for draw in range(_MAX_DRAWS):
            salt = (self._stream, attempt, draw)
            known = (others, dict(trials)) if draw < _MODEL_DRAWS else ([], {})
            params = self._suggester.suggest_beside(known[0], number, known[1], point, salt)
            if not _is_among(by_key(space, params), taken):
                return params
        return None

    def _free_point(self, taken: Sequence[FrozenTrial]) -> Mapping[str, Any] | None:
        """The first starting point that no trial has all values of."""
        for point in self._config.search.points:
            wanted = by_key(self._config.space, dict(point))
            if not any(wanted.items() <= trial.params.items() for trial in taken):
                return point
        return None


def open_mirror(
    config: SweepConfig, folder: Path, sweep_id: str, protocol: Protocol, suggester: Suggester
) -> tuple[Mirror, SharedSearch | None]:
    """The sweep's study, and what draws its trials where other sweeps share it; raises as `Mirror`."""
    storage, address = config.storage, study_url(config, folder)
    if storage.study_name is None:
        return Mirror(config.name, address, sweep_id, config.space, config.trial.evaluation), None
    common = common_to(config, protocol)
    mirror = Mirror(storage.study_name, address, sweep_id, config.space, config.trial.evaluation, common)
    return mirror, SharedSearch(config, mirror.study, sweep_id, suggester)


def common_to(config: SweepConfig, protocol: Protocol) -> dict[str, Any]:
    """What sweeps that share a study must have in common: what is trained, searched and measured."""
    values = config.to_dict()
    measured = {key: value for key, value in protocol.items() if key != "data.path"}
    # Each machine may keep the same images elsewhere.
    trial = {key: value for key, value in flatten(values["trial"]).items() if key != "data.path"}
    return {"metric": config.objective, "protocol": measured, "trial": trial, "space": values["space"]}


def _is_among(params: Params, trials: Sequence[FrozenTrial]) -> bool:
    return any(trial.params == params for trial in trials)
