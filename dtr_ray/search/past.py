"""Past: the trials before, as a sampler sees them, not built and copied anew for every suggestion."""

import copy
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from dtr_ray.search.journal import TrialRecord


class Past:
    """Keeps the Optuna form of a sweep's trials, and makes anew only those that have changed."""

    def __init__(self, frozen_trial: Callable[[TrialRecord], FrozenTrial]) -> None:
        """`frozen_trial` makes a trial's Optuna form, from its parameters, status and reports alone."""
        self._frozen_trial = frozen_trial
        self._kept: dict[str, tuple[Any, FrozenTrial]] = {}

    def storage(self, others: Iterable[FrozenTrial], records: Iterable[TrialRecord]) -> InMemoryStorage:
        """A storage for one study, whose first trials are those of other sweeps, then those of this one."""
        trials = [copy.copy(other) for other in others] + [self._frozen(record) for record in records]
        # The storage gives number 0 to the trial that is asked for; of the others only the order counts.
        for number, trial in enumerate(trials, 1):
            trial.number = number
        return _Showing(trials)

    def _frozen(self, record: TrialRecord) -> FrozenTrial:
        state = (record.status, len(record.reports), record.params)
        kept = self._kept.get(record.trial_id)
        if kept is None or kept[0] != state:
            kept = self._kept[record.trial_id] = (state, self._frozen_trial(record))
        return kept[1]


class _Showing(InMemoryStorage):
    """Shows given trials before its own, neither copied nor changed."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._before = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As the base class says."""
        before = [trial for trial in self._before if states is None or trial.state in states]
        own = super().get_all_trials(study_id, deepcopy=False, states=states)
        return copy.deepcopy([*before, *own]) if deepcopy else [*before, *own]
