"""Early stopping: pure functions of what all trials have reported so far.

Nothing is kept between calls, so a sweep that is killed and resumed decides as if it had never stopped.
`History` is a trial's reported values by training step; smaller is better. Up to a step they may be proxies,
cheaper figures which compare with one another alone.
"""

import math
import statistics
from collections.abc import Mapping

from dtr_ray.config.sweep import ASHAStopping, MedianStopping, NoStopping

History = Mapping[int, float]
StoppingRule = NoStopping | ASHAStopping | MedianStopping


def rungs(rule: ASHAStopping, num_steps: int) -> list[int]:
    """Training steps below `num_steps` at which trials are compared: grace_steps * reduction_factor ** k."""
    steps, step = [], float(rule.grace_steps)
    while round(step) < num_steps:
        steps.append(round(step))
        step *= rule.reduction_factor
    return steps


def value_at(history: History, step: int) -> tuple[int, float] | None:
    """First (step, value) reported at `step` or later."""
    if step in history:
        return step, history[step]
    return min(((s, v) for s, v in history.items() if s >= step), default=None)


def should_stop(
    rule: StoppingRule,
    trial: str,
    step: int,
    histories: Mapping[str, History],
    num_steps: int,
    *,
    error: float = 0.0,
    proxy_until: int = 0,
) -> str | None:
    """Why `trial` stops after its report of `step`, or None if it goes on.

    Args:
        rule: the early stopping of the sweep.
        trial: a key of `histories`, whose last report is that of `step`.
        step: training step of the report; at `num_steps` a trial is complete and never stopped.
        histories: every trial's reports so far, of failed and stopped ones too.
        num_steps: training steps of a whole trial.
        error: standard error of the trial's value at `step`, 0 where it is not known.
        proxy_until: values of this step and before are proxies.
    """
    if isinstance(rule, NoStopping) or step >= num_steps or not math.isfinite(histories[trial][step]):
        return None
    slack = rule.sigma * error if math.isfinite(error) else 0.0
    if isinstance(rule, ASHAStopping):
        return _asha(rule, trial, step, histories, num_steps, slack, proxy_until)
    if proxy_until or any(0 in history for history in histories.values()):
        histories = {
            name: {s: value for s, value in history.items() if (s <= proxy_until) == (step <= proxy_until)}
            for name, history in histories.items()
        }
    return _median(rule, trial, step, histories, slack)


def _asha(
    rule: ASHAStopping,
    trial: str,
    step: int,
    histories: Mapping[str, History],
    num_steps: int,
    slack: float,
    proxy_until: int,
) -> str | None:
    """ASHA (Li et al. 2020) in its stopping form: on only with the best 1 / reduction_factor of the rung.

    The rung's trials are those that have reached it so far, this one included, and at least one goes on.
    """
    for rung in rungs(rule, num_steps):
        mine = value_at(histories[trial], rung)
        if mine is None or mine[0] != step:
            continue
        found = [at for history in histories.values() if (at := value_at(history, rung)) is not None]
        # All trials are evaluated at the same steps where there are proxies: the sweep's rules see to it.
        assert len({first <= proxy_until for first, _ in found}) == 1
        values = sorted(value for _, value in found)
        num_promoted = max(1, int(len(values) / rule.reduction_factor))
        cutoff = values[num_promoted - 1]
        if mine[1] - slack > cutoff * (1 + rule.tolerance):
            place = f"the best {num_promoted} of {len(values)} (<= {cutoff:.6g})"
            return f"{mine[1]:.6g} at rung {rung} is not among {place}"
    return None


def _median(
    rule: MedianStopping, trial: str, step: int, histories: Mapping[str, History], slack: float
) -> str | None:
    """Stops when the trial's best value is worse than the median of the others' best by the same step."""
    if step < rule.grace_steps:
        return None
    best = {
        name: min(v for s, v in history.items() if s <= step)
        for name, history in histories.items()
        if any(s <= step for s in history) and (name == trial or max(history) >= step)
    }
    mine = best.pop(trial)
    if len(best) < rule.min_trials:
        return None
    median = statistics.median(best.values())
    if mine - slack > median * (1 + rule.tolerance):
        return f"best {mine:.6g} by step {step} is worse than the median {median:.6g} of {len(best)} trials"
    return None
