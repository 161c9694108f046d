import torch
from hypothesis import given
from hypothesis import strategies as st

from dtr_ray.randomness import keyed_draws, keyed_generator

KEYS = st.lists(st.integers(min_value=0, max_value=2**70), min_size=1, max_size=4).map(tuple)


@given(KEYS)
def test_the_same_key_gives_the_same_numbers(key: tuple[int, ...]):
    first, second = (torch.rand(4, generator=keyed_generator(*key)) for _ in range(2))
    assert torch.equal(first, second)


@given(KEYS, KEYS)
def test_different_keys_give_different_seeds(one: tuple[int, ...], other: tuple[int, ...]):
    seeds = [keyed_generator(*key).initial_seed() for key in (one, other)]
    assert (seeds[0] == seeds[1]) == (one == other)


@given(KEYS)
def test_a_key_and_the_same_with_a_zero_more_are_two(key: tuple[int, ...]):
    assert keyed_generator(*key).initial_seed() != keyed_generator(*key, 0).initial_seed()


def test_neighbouring_keys_are_unrelated():
    draws = torch.stack([torch.randn(2000, generator=keyed_generator(0, 1, step)) for step in range(50)])
    correlations = torch.corrcoef(draws) - torch.eye(50)
    assert correlations.abs().max() < 0.12  # 5.4 standard deviations
    assert abs(draws.mean().item()) < 0.02


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(3, generator=keyed_generator(1, 2, 3))
    assert torch.equal(torch.rand(3), expected)


def test_keyed_draws_are_the_keys_alone_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seen = []
    for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)):
        with keyed_draws(*key, device=torch.device("cpu")):
            seen.append(torch.nn.functional.dropout(torch.ones(100)))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(torch.rand(3), expected)
