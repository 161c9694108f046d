"""Early stopping decides from what has been reported, and from nothing else."""

import statistics
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_ray.config.sweep import ASHAStopping, MedianStopping, NoStopping
from dtr_ray.search.stopping import Standings, StoppingRule, rungs

ASHA = ASHAStopping(name="asha", grace_steps=100, reduction_factor=2)
Histories = Mapping[str, Mapping[int, float]]


def should_stop(
    rule: StoppingRule,
    trial: str,
    step: int,
    histories: Histories,
    num_steps: int,
    *,
    error: float = 0.0,
    proxy_until: int = 0,
) -> str | None:
    """Why a trial stops whose newest report is that of `step`, from all trials' values by step."""
    standings = Standings(rule, proxy_until)
    for name, history in histories.items():
        for at, value in history.items():
            standings.add(name, at, value)
    return standings.reason(trial, step, histories[trial][step], num_steps, error=error)


def plainly_stopped(
    rule: StoppingRule, trial: str, step: int, histories: Histories, proxy_until: int
) -> bool:
    """The rules as their papers say them, from all reports so far, at a step before the last one."""
    mine = histories[trial][step]
    same = {
        name: {at: value for at, value in history.items() if (at <= proxy_until) == (step <= proxy_until)}
        for name, history in histories.items()
    }
    if isinstance(rule, MedianStopping):
        if step < rule.grace_steps:
            return False
        reached = {name: h for name, h in same.items() if h and min(h) <= step <= max(h)}
        best = {name: min(v for at, v in h.items() if at <= step) for name, h in reached.items()}
        own = best.pop(trial)
        return len(best) >= rule.min_trials and own > statistics.median(best.values()) * (1 + rule.tolerance)
    assert isinstance(rule, ASHAStopping)
    for rung in rungs(rule, 10**6):
        first = {name: min(at for at in h if at >= rung) for name, h in histories.items() if max(h) >= rung}
        if first.get(trial) == step:
            ranked = sorted(histories[name][at] for name, at in first.items())
            cutoff = ranked[max(1, int(len(ranked) / rule.reduction_factor)) - 1]
            if mine > cutoff * (1 + rule.tolerance):
                return True
    return False


def test_rungs_grow_by_the_reduction_factor_and_end_before_the_last_step() -> None:
    assert rungs(ASHA, 800) == [100, 200, 400]
    assert rungs(ASHA, 801) == [100, 200, 400, 800]
    assert rungs(ASHAStopping(name="asha", grace_steps=1000, reduction_factor=3), 900) == []


def test_the_first_trial_at_a_rung_goes_on() -> None:
    assert should_stop(ASHA, "a", 100, {"a": {100: 9.0}}, 800) is None


def test_a_trial_outside_the_best_half_of_its_rung_stops_with_the_figures_that_decided() -> None:
    histories = {"a": {100: 1.0}, "b": {100: 2.0}}
    reason = should_stop(ASHA, "b", 100, histories, 800)
    assert reason == "2 at rung 100 is not among the best 1 of 2 (<= 1)"


def test_tolerance_keeps_a_trial_that_the_metric_cannot_tell_from_the_cutoff() -> None:
    histories = {"a": {100: 1.0}, "b": {100: 1.01}}
    tolerant = ASHA.model_copy(update={"tolerance": 0.02})
    assert should_stop(ASHA, "b", 100, histories, 800) is not None
    assert should_stop(tolerant, "b", 100, histories, 800) is None


def test_a_report_after_the_rung_counts_for_it_once() -> None:
    """Evaluations need not fall on rungs: the first one at or after a rung is compared there."""
    histories = {"a": {150: 1.0, 300: 0.5}, "b": {150: 2.0}}
    assert should_stop(ASHA, "b", 150, histories, 800) is not None
    later = {"a": {150: 1.0}, "b": {150: 0.9, 180: 5.0}}
    assert should_stop(ASHA, "b", 180, later, 800) is None


@pytest.mark.parametrize("rule", [ASHA, MedianStopping(name="median", grace_steps=1, min_trials=1)])
def test_a_trial_is_never_stopped_at_its_last_step(rule: ASHAStopping | MedianStopping) -> None:
    histories = {"a": {100: 1.0}, "b": {100: 5.0}}
    assert should_stop(rule, "b", 100, histories, 100) is None


def test_no_rule_never_stops() -> None:
    histories = {"a": {100: 1.0}, "b": {100: 5.0}}
    assert should_stop(NoStopping(), "b", 100, histories, 800) is None


def test_the_median_rule_waits_for_grace_and_for_enough_trials() -> None:
    rule = MedianStopping(name="median", grace_steps=100, min_trials=2)
    two = {"a": {100: 1.0}, "b": {100: 9.0}}
    three = {**two, "c": {100: 2.0}}
    assert should_stop(rule, "b", 100, two, 800) is None
    assert should_stop(rule, "b", 100, three, 800) is not None
    early = {name: {50: values[100]} for name, values in three.items()}
    assert should_stop(rule, "b", 50, early, 800) is None


def test_the_median_rule_judges_a_trial_by_its_best_value() -> None:
    rule = MedianStopping(name="median", grace_steps=100, min_trials=2)
    histories = {"a": {100: 1.5, 200: 1.0}, "b": {100: 0.9, 200: 9.0}, "c": {100: 2.0, 200: 1.2}}
    assert should_stop(rule, "b", 200, histories, 800) is None


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.floats(1.5, 4))
def test_trials_that_come_one_by_one_never_all_stop(values: list[float], factor: float) -> None:
    rule = ASHA.model_copy(update={"reduction_factor": factor})
    histories: dict[str, dict[int, float]] = {}
    kept = []
    for i, value in enumerate(values):
        histories[str(i)] = {100: value}
        if should_stop(rule, str(i), 100, histories, 800) is None:
            kept.append(value)
    assert min(values) in kept


def test_standard_errors_keep_a_trial_that_may_be_within_the_cutoff() -> None:
    histories = {"a": {100: 1.0}, "b": {100: 1.3}}
    patient = ASHA.model_copy(update={"sigma": 2.0})
    assert should_stop(ASHA, "b", 100, histories, 800, error=0.2) is not None
    assert should_stop(patient, "b", 100, histories, 800, error=0.2) is None
    assert should_stop(patient, "b", 100, histories, 800, error=0.1) is not None
    # An error that is not known, or no number, is none.
    assert should_stop(patient, "b", 100, histories, 800) is not None
    assert should_stop(patient, "b", 100, histories, 800, error=float("nan")) is not None
    median = MedianStopping(name="median", grace_steps=1, min_trials=1, sigma=2.0)
    assert should_stop(median, "b", 100, histories, 800, error=0.2) is None
    assert should_stop(median, "b", 100, histories, 800, error=0.1) is not None


def test_the_median_rule_compares_proxies_with_proxies_alone() -> None:
    """A proxy of fewer samples is always higher: among full figures it must count for nobody."""
    rule = MedianStopping(name="median", grace_steps=1, min_trials=1)
    histories = {"a": {100: 50.0, 200: 3.0}, "b": {100: 5.0, 200: 4.0}}
    reason = should_stop(rule, "b", 200, histories, 800, proxy_until=100)
    assert reason == "best 4 by step 200 is worse than the median 3 of 1 trials"
    # And a low proxy saves nobody: without its kind being known, 2 would be the best of `b`.
    low = {"a": {100: 9.0, 200: 3.0}, "b": {100: 2.0, 200: 4.0}}
    assert should_stop(rule, "b", 200, low, 800, proxy_until=100) is not None
    assert should_stop(rule, "b", 200, low, 800) is None
    assert should_stop(rule, "a", 100, low, 800, proxy_until=100) is not None


def test_a_rung_among_the_proxies_is_decided_by_them_and_one_after_by_the_full_figures() -> None:
    histories = {"a": {100: 50.0, 200: 3.0}, "b": {100: 40.0, 200: 4.0}}
    assert should_stop(ASHA, "a", 100, histories, 800, proxy_until=100) is not None
    assert should_stop(ASHA, "b", 100, histories, 800, proxy_until=100) is None
    assert should_stop(ASHA, "b", 200, histories, 800, proxy_until=100) is not None
    assert should_stop(ASHA, "a", 200, histories, 800, proxy_until=100) is None


def test_a_rung_never_mixes_proxies_and_full_figures() -> None:
    histories = {"a": {100: 50.0}, "b": {120: 4.0}}
    with pytest.raises(AssertionError):
        should_stop(ASHA, "b", 120, histories, 800, proxy_until=110)


RULES = [
    ASHAStopping(name="asha", grace_steps=10, reduction_factor=1.5),
    ASHAStopping(name="asha", grace_steps=15, reduction_factor=3, tolerance=0.2),
    MedianStopping(name="median", grace_steps=10, min_trials=1),
    MedianStopping(name="median", grace_steps=30, min_trials=3, tolerance=0.1),
]
# Few values, so that many are equal; a trial may repeat a step, or report an earlier one.
REPORTS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9), st.integers(1, 5)), max_size=60)


@given(st.sampled_from(RULES), st.sampled_from([0, 40]), REPORTS)
def test_figures_kept_in_order_decide_as_a_look_at_all_of_them(
    rule: ASHAStopping | MedianStopping, proxy_until: int, reports: list[tuple[str, int, int]]
) -> None:
    """Where there are proxies all trials are evaluated at the same steps, one after the other."""
    standings, histories = Standings(rule, proxy_until), dict[str, dict[int, float]]()
    for trial, tens, value in reports:
        history = histories.setdefault(trial, {})
        step = 10 * (len(history) + 1 if proxy_until else tens)
        history[step] = float(value)
        standings.add(trial, step, float(value))
        stopped = standings.reason(trial, step, float(value), 10**6) is not None
        assert stopped == plainly_stopped(rule, trial, step, histories, proxy_until)
