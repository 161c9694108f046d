"""Early stopping: decisions that follow from what all trials have reported so far, and from nothing else.

So a sweep that is killed and resumed decides as if it had never stopped: it tells `Standings` all reports
again. Figures are kept in order as they come, since thousands of trials would be too many to look at for
every decision. Smaller is better. Up to a step figures may be proxies, cheaper ones which compare with one
another alone.
"""

import math
import statistics
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from dtr_ray.config.sweep import ASHAStopping, MedianStopping, NoStopping

StoppingRule = NoStopping | ASHAStopping | MedianStopping


class _Asked(NamedTuple):
    """A trial's newest report, and what a decision about it needs."""

    trial: str
    step: int
    value: float
    slack: float
    num_steps: int


class _Kept(Protocol):
    def add(self, trial: str, step: int, value: float) -> None: ...

    def reason(self, asked: _Asked) -> str | None: ...


class Standings:
    """All trials' reports as early stopping compares them, those of failed and stopped trials too."""

    def __init__(self, rule: StoppingRule, proxy_until: int = 0) -> None:
        """`proxy_until`: figures of this training step and before are proxies."""
        self._rule = rule
        self._kept: _Kept | None = None
        if isinstance(rule, ASHAStopping):
            self._kept = _Rungs(rule, proxy_until)
        elif isinstance(rule, MedianStopping):
            self._kept = _Medians(rule, proxy_until)

    def add(self, trial: str, step: int, value: float) -> None:
        """Takes a trial's value at a training step from 1 on; a second one replaces it."""
        if self._kept is not None:
            self._kept.add(trial, step, value)

    def reason(
        self, trial: str, step: int, value: float, num_steps: int, *, error: float = 0.0
    ) -> str | None:
        """Why the trial stops after its newest report, which was added, or None if it goes on.

        Args:
            trial: as it was added.
            step: training step of the report; at `num_steps` a trial is complete and never stopped.
            value: what it reported.
            num_steps: training steps of a whole trial.
            error: standard error of the value, 0 where it is not known.
        """
        if isinstance(self._rule, NoStopping) or step >= num_steps or not math.isfinite(value):
            return None
        assert self._kept is not None
        slack = self._rule.sigma * error if math.isfinite(error) else 0.0
        return self._kept.reason(_Asked(trial, step, value, slack, num_steps))


def rungs(rule: ASHAStopping, num_steps: int) -> list[int]:
    """Training steps below `num_steps` at which trials are compared: grace_steps * reduction_factor ** k."""
    steps, step = [], float(rule.grace_steps)
    while round(step) < num_steps:
        steps.append(round(step))
        step *= rule.reduction_factor
    return steps


class _Rungs:
    """ASHA (Li et al. 2020) in its stopping form: on only with the best 1 / reduction_factor of the rung.

    A rung's trials are those that have reached it so far, the asking one included, and at least one goes on.
    Each counts with what it first reported at the rung or later.
    """

    def __init__(self, rule: ASHAStopping, proxy_until: int) -> None:
        self._rule, self._proxy_until = rule, proxy_until
        self._first: dict[int, dict[str, tuple[int, float]]] = defaultdict(dict)
        self._values: dict[int, list[float]] = defaultdict(list)
        self._kinds: dict[int, set[bool]] = defaultdict(set)

    def add(self, trial: str, step: int, value: float) -> None:
        for rung in rungs(self._rule, step + 1):
            first, values = self._first[rung], self._values[rung]
            if trial in first:
                if first[trial][0] < step:
                    continue
                del values[bisect_left(values, first[trial][1])]
            first[trial] = step, value
            insort(values, value)
            self._kinds[rung].add(step <= self._proxy_until)

    def reason(self, asked: _Asked) -> str | None:
        for rung in rungs(self._rule, asked.num_steps):
            if rung > asked.step or self._first[rung][asked.trial][0] != asked.step:
                continue
            # All trials are evaluated at the same steps where there are proxies: the sweep's rules see to it.
            assert len(self._kinds[rung]) == 1
            values = self._values[rung]
            num_promoted = max(1, int(len(values) / self._rule.reduction_factor))
            cutoff = values[num_promoted - 1]
            if asked.value - asked.slack > cutoff * (1 + self._rule.tolerance):
                place = f"the best {num_promoted} of {len(values)} (<= {cutoff:.6g})"
                return f"{asked.value:.6g} at rung {rung} is not among {place}"
        return None


class _Medians:
    """Stops a trial whose best value is worse than the median of the others' best by the same step.

    The others are those that have reported at the step or later. Proxies and full figures are kept apart.
    """

    def __init__(self, rule: MedianStopping, proxy_until: int) -> None:
        self._rule, self._proxy_until = rule, proxy_until
        self._histories: dict[bool, dict[str, dict[int, float]]] = {True: {}, False: {}}
        self._bests: dict[int, list[float]] = {}
        """By step that any trial has reported: the trials' best values by then, in order."""

    def add(self, trial: str, step: int, value: float) -> None:
        is_proxy = step <= self._proxy_until
        histories = self._histories[is_proxy]
        if step not in self._bests:
            found = (_best_by(history, step) for history in histories.values())
            self._bests[step] = sorted(best for best in found if best is not None)
        history = histories.setdefault(trial, {})
        before = dict(history)
        history[step] = value
        since = min(step, max(before, default=step))
        for at in [at for at in self._bests if at >= since and (at <= self._proxy_until) == is_proxy]:
            was, now = _best_by(before, at), _best_by(history, at)
            if was is not None:
                del self._bests[at][bisect_left(self._bests[at], was)]
            if now is not None:
                insort(self._bests[at], now)

    def reason(self, asked: _Asked) -> str | None:
        step = asked.step
        if step < self._rule.grace_steps:
            return None
        best = _best_by(self._histories[step <= self._proxy_until][asked.trial], step)
        assert best is not None
        values = self._bests[step]
        place = bisect_left(values, best)
        others = values[:place] + values[place + 1 :]
        if len(others) < self._rule.min_trials:
            return None
        median = statistics.median(others)
        if best - asked.slack > median * (1 + self._rule.tolerance):
            how = f"is worse than the median {median:.6g} of {len(others)} trials"
            return f"best {best:.6g} by step {step} {how}"
        return None


def _best_by(history: Mapping[int, float], step: int) -> float | None:
    """The best value up to a step, of a trial that has reported at it or later; None without one."""
    if not history or max(history) < step:
        return None
    return min((value for at, value in history.items() if at <= step), default=None)
