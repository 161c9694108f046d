"""Sweeps on one cluster: what each may run, and that none waits for ever."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service.cluster import Node
from dtr_ray.service.shares import Claim, allowances, shares

ONE = ResourcesConfig()

nodes = st.lists(
    st.builds(Node, st.integers(1, 24).map(float), st.integers(0, 4).map(float)), min_size=1, max_size=4
)
needs = st.one_of(
    st.builds(ResourcesConfig, cpus_per_worker=st.integers(1, 8), workers_per_trial=st.integers(1, 4)),
    st.builds(ResourcesConfig, gpus_per_worker=st.sampled_from([0.25, 0.5, 1.0, 2.0])),
)


def claim(
    key: str, running: int = 0, wanted: int = 100, turn: int = 0, needs: ResourcesConfig = ONE
) -> Claim:
    return Claim(key, key, needs, wanted, running, turn)


claims = st.lists(
    st.builds(claim, key=st.just(""), wanted=st.integers(0, 12), turn=st.integers(0, 5), needs=needs),
    min_size=1,
    max_size=5,
).map(lambda found: [Claim(**{**vars(one), "key": str(n)}) for n, one in enumerate(found)])


def fits(counts: dict[str, int], sweeps: list[Claim], machines: list[Node]) -> bool:
    """Whether CPUs and GPUs of the whole cluster are enough."""
    cpus = gpus = 0.0
    for sweep in sweeps:
        workers = counts[sweep.key] * sweep.resources.workers_per_trial
        cpus += workers * sweep.resources.cpus_per_worker
        gpus += workers * sweep.resources.gpus_per_worker
    return cpus <= sum(m.cpus for m in machines) and gpus <= sum(m.gpus for m in machines) + 1e-6


@given(claims, nodes)
def test_together_they_never_want_more_than_there_is(sweeps: list[Claim], machines: list[Node]):
    found = shares(sweeps, machines)
    assert fits(found, sweeps, machines)
    assert all(0 <= found[sweep.key] <= sweep.wanted for sweep in sweeps)


@given(claims, nodes)
def test_all_find_the_same_in_whatever_order_they_look(sweeps: list[Claim], machines: list[Node]):
    mixed = random.Random(0).sample(sweeps, len(sweeps))
    assert shares(mixed, machines) == shares(sweeps, machines)
    assert allowances(mixed, machines) == allowances(sweeps, machines)


@given(st.integers(1, 5), st.integers(1, 32))
def test_like_sweeps_get_like_shares_of_all_there_is(count: int, cpus: int):
    found = shares([claim(str(n)) for n in range(count)], [Node(float(cpus), 0.0)])
    assert sum(found.values()) == cpus
    assert max(found.values()) - min(found.values()) <= 1


def test_what_one_does_not_want_the_others_get():
    machines = [Node(8.0, 0.0)]
    assert shares([claim("a"), claim("b", wanted=1), claim("c", wanted=2)], machines) == {
        "a": 5,
        "b": 1,
        "c": 2,
    }


def test_a_sweep_alone_has_the_whole_cluster():
    assert shares([claim("a")], [Node(4.0, 0.0), Node(3.0, 0.0)]) == {"a": 7}


def test_sweeps_that_need_different_things_do_not_stand_in_each_others_way():
    gpu = ResourcesConfig(gpus_per_worker=1.0, cpus_per_worker=2)
    machines = [Node(16.0, 4.0), Node(8.0, 0.0)]
    found = shares([claim("a", needs=gpu), claim("b", wanted=8)], machines)
    assert found == {"a": 4, "b": 8}


def test_a_trial_that_runs_is_not_taken_away_and_none_follows_it_until_enough_have_ended():
    machines, late = [Node(4.0, 0.0)], claim("b", turn=0)
    for running, first, second in ((4, 4, 0), (3, 3, 1), (2, 2, 2)):
        found = allowances([claim("a", running, turn=4), late], machines)
        assert found == {"a": first, "b": second}


def test_the_room_that_comes_free_goes_to_one_and_not_to_all_who_wait():
    machines = [Node(3.0, 0.0)]
    found = allowances([claim("a", 2, turn=9), claim("b", turn=1), claim("c")], machines)
    assert found == {"a": 2, "b": 0, "c": 1}


@pytest.mark.parametrize(("count", "cpus"), [(3, 2), (4, 1), (5, 3)])
def test_where_there_are_more_sweeps_than_room_they_take_turns(count: int, cpus: int):
    """A trial ends at a time; whoever may starts the next."""
    dice, machines = random.Random(1), [Node(float(cpus), 0.0)]
    state = {str(n): claim(str(n)) for n in range(count)}
    begun = dict.fromkeys(state, 0)
    for _ in range(200):
        busy = [key for key, one in state.items() if one.running]
        if busy:
            key = dice.choice(busy)
            state[key] = Claim(**{**vars(state[key]), "running": state[key].running - 1})
        for key in dice.sample(list(state), count):
            one = state[key]
            if allowances(list(state.values()), machines)[key] > one.running:
                turn = 1 + max(other.turn for other in state.values())
                state[key] = Claim(**{**vars(one), "running": one.running + 1, "turn": turn})
                begun[key] += 1
        assert sum(one.running for one in state.values()) == cpus
    assert max(begun.values()) - min(begun.values()) <= count, begun


def test_on_a_cluster_that_grows_each_has_its_part_of_what_it_may_become():
    def grows(most: int) -> ResourcesConfig:
        return ResourcesConfig(autoscaling=True, max_concurrent=most)

    head = [Node(0.0, 0.0)]
    assert shares([claim("a", wanted=8, needs=grows(8))], head) == {"a": 8}
    both = [claim("a", 8, wanted=8, needs=grows(8)), claim("b", wanted=4, needs=grows(4))]
    assert shares(both, head) == {"a": 4, "b": 2}
    # One is asked for, or the cluster would not grow.
    assert allowances(both, head) == {"a": 8, "b": 1}


def test_a_trial_that_can_do_with_fewer_workers_gets_its_turn_where_it_never_fits_whole():
    shrunk = ResourcesConfig(workers_per_trial=4, min_workers_per_trial=2)
    assert shares([claim("a", needs=shrunk), claim("b")], [Node(3.0, 0.0)]) == {"a": 1, "b": 1}
    assert shares([claim("a", needs=shrunk), claim("b")], [Node(1.0, 0.0)]) == {"a": 0, "b": 1}


def test_a_claim_comes_back_as_it_was_written():
    one = claim("a", 3, 4, 5, ResourcesConfig(workers_per_trial=2, gpus_per_worker=1.0, max_concurrent=7))
    assert Claim.from_dict(one.to_dict()) == one
