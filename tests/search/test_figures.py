"""What a sweep keeps up to date about its trials is what a look at all of them would find."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_ray.search.figures import Tally
from dtr_ray.search.journal import Status, TrialRecord

METRIC = "fid"
# What happens to a trial: reports of a value at a step (equal ones included), or its end.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.one_of(st.tuples(st.integers(0, 6), st.integers(1, 4)), st.sampled_from(["pruned", "failed"])),
    ),
    max_size=60,
)


@given(EVENTS)
def test_the_tally_holds_what_a_look_at_all_trials_finds(
    events: list[tuple[int, tuple[int, int] | Status]],
) -> None:
    tally, trials = Tally(METRIC), dict[int, TrialRecord]()
    for number, event in events:
        trial = trials.setdefault(number, TrialRecord(f"t{number}", number, {}))
        if isinstance(event, str):
            trial.status = event
        else:
            trial.reports[event[0]] = {METRIC: float(event[1])} if event[1] < 4 else {"proxy": 1.0}
            trial.wall_s += 0.1 * event[1]
        tally.update(trial)
        scored = [
            (best[1], each.number, best[0])
            for each in trials.values()
            if each.status != "failed" and (best := each.best(METRIC)) is not None
        ]
        found = None if tally.best is None else (tally.best[2], tally.best[0].number, tally.best[1])
        assert found == min(scored, default=None)
        for status in ("running", "pruned", "failed", "completed"):
            ours = [each for each in trials.values() if each.status == status]
            assert tally.trials(status) == sorted(ours, key=lambda each: each.number)
            assert tally.count(status) == len(ours)
        assert tally.steps == sum(each.last_step for each in trials.values())
        assert tally.seconds == pytest.approx(sum(each.wall_s for each in trials.values()))
