"""Masks: against the authors' code, and what every mask keeps to."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtr_ray.bounds import uniform_bounds
from dtr_ray.models.routing import (
    between,
    clustered_mask,
    dtr_mask,
    explicit_clustered_mask,
    max_roaming_mask,
    random_mask,
)

timesteps = st.integers(2, 120)
channels = st.integers(1, 96)
alphas = st.floats(0.05, 20)
betas = st.floats(0.01, 1)


@pytest.mark.parametrize("index", range(7))
def test_dtr_mask_is_the_authors_bit_for_bit(golden, index):
    cases, arrays = golden("dtr_masks")
    case = cases[index]
    mask = dtr_mask(case["T"], case["C"], case["alpha"], case["beta"])
    bits = mask.numpy().astype(np.uint8).tobytes()
    assert hashlib.sha256(bits).hexdigest() == case["sha256_uint8_rowmajor"]
    np.testing.assert_array_equal(mask.int().argmax(dim=1).numpy(), arrays[f"c{index}_start"])
    np.testing.assert_array_equal(mask.sum(dim=1).numpy(), arrays[f"c{index}_width"])


def naive_equation(num_timesteps, num_channels, alpha, beta):
    """DTR's eq. (4) as printed: t and c count from 1."""
    T, C, on = num_timesteps, num_channels, int(beta * num_channels)
    return torch.tensor(
        [
            [
                round((C - on) * ((t - 1) / T) ** alpha) < c <= round((C - on) * (t / T) ** alpha) + on
                for c in range(1, C + 1)
            ]
            for t in range(1, T + 1)
        ]
    )


@pytest.mark.parametrize(("index", "rows"), [(0, 154), (1, 154), (2, 198), (3, 23), (4, 0), (5, 9), (6, 77)])
def test_the_equation_differs_from_the_authors_mask_in_as_many_rows_as_they_say(golden, index, rows):
    case = golden("dtr_masks")[0][index]
    sizes = case["T"], case["C"], case["alpha"], case["beta"]
    differs = dtr_mask(*sizes) ^ dtr_mask(*sizes, rule="equation")
    assert differs.any(dim=1).sum() == rows
    assert differs.sum() == case["C"] - int(case["beta"] * case["C"])


@given(timesteps, channels, alphas, betas)
@settings(deadline=None)
def test_the_equation_s_window_holds_the_other_and_is_as_printed(num_timesteps, num_channels, alpha, beta):
    assume(int(beta * num_channels) >= 1)
    listing = dtr_mask(num_timesteps, num_channels, alpha, beta)
    equation = dtr_mask(num_timesteps, num_channels, alpha, beta, "equation")
    assert torch.equal(equation, naive_equation(num_timesteps, num_channels, alpha, beta))
    assert torch.equal(equation | listing, equation)
    assert (equation ^ listing).sum() == num_channels - int(beta * num_channels)
    starts = equation.int().argmax(dim=1)
    ends = num_channels - equation.flip(1).int().argmax(dim=1)
    assert (ends - starts == equation.sum(dim=1)).all()  # contiguous
    assert (starts.diff() >= 0).all()
    assert (ends.diff() >= 0).all()


@given(timesteps, channels, alphas, betas)
@settings(deadline=None)
def test_dtr_windows_are_contiguous_of_one_width_and_never_move_back(
    num_timesteps, num_channels, alpha, beta
):
    assume(int(beta * num_channels) >= 1)
    mask = dtr_mask(num_timesteps, num_channels, alpha, beta)
    width = int(beta * num_channels)
    assert mask.dtype == torch.bool
    assert mask.shape == (num_timesteps, num_channels)
    assert (mask.sum(dim=1) == width).all()
    starts = mask.int().argmax(dim=1)
    ends = num_channels - mask.flip(1).int().argmax(dim=1)
    assert (ends - starts == width).all()
    assert (starts.diff() >= 0).all()
    assert starts[0] == 0
    assert ends[-1] == num_channels


@given(timesteps, channels, alphas, betas)
@settings(deadline=None)
def test_dtr_timesteps_share_no_fewer_channels_the_nearer_they_are(num_timesteps, num_channels, alpha, beta):
    assume(int(beta * num_channels) >= 1)
    mask = dtr_mask(num_timesteps, num_channels, alpha, beta).long()
    shared = mask @ mask.T
    assert all((shared[row, row:].diff() <= 0).all() for row in range(num_timesteps))
    assert all((shared[row, : row + 1].diff() >= 0).all() for row in range(num_timesteps))


@given(timesteps, channels, betas, st.integers(0, 2**31))
@settings(deadline=None)
def test_random_rows_have_the_share_of_channels_on_and_repeat_with_the_seed(
    num_timesteps, num_channels, beta, seed
):
    assume(int(beta * num_channels) >= 1)
    mask = random_mask(num_timesteps, num_channels, beta, seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (num_timesteps, num_channels)
    assert (mask.sum(dim=1) == int(beta * num_channels)).all()
    assert torch.equal(mask, random_mask(num_timesteps, num_channels, beta, seed))


def test_random_rows_differ_and_favour_no_channel():
    mask = random_mask(1000, 64, 0.8, seed=0)
    assert len(mask.unique(dim=0)) == 1000
    share = mask.double().mean(dim=0)
    assert (share - 51 / 64).abs().max() < 5 * (0.8 * 0.2 / 1000) ** 0.5
    assert not torch.equal(mask, random_mask(1000, 64, 0.8, seed=1))


def test_random_mask_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    random_mask(10, 8, 0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_a_share_of_one_turns_everything_on():
    assert dtr_mask(10, 8, 4.0, 1.0).all()
    assert dtr_mask(10, 8, 4.0, 1.0, "equation").all()
    assert random_mask(10, 8, 1.0, 0).all()
    assert max_roaming_mask(10, 8, 1.0, 0, 5).all()
    assert clustered_mask(10, 8, 4.0, 1.0, 3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8, 4.0, 0.8), "num_timesteps is 1: it must be at least 2"),
        ((10, 8, 0.0, 0.8), "alpha is 0.0: it must be a finite number above 0"),
        ((10, 8, -1.0, 0.8), "alpha is -1.0"),
        ((10, 8, float("nan"), 0.8), "alpha is nan"),
        ((10, 8, float("inf"), 0.8), "alpha is inf"),
        ((10, 8, 4.0, 0.0), r"beta is 0.0: it must be in \(0, 1\]"),
        ((10, 8, 4.0, 1.1), "beta is 1.1"),
        ((10, 8, 4.0, float("nan")), "beta is nan"),
        ((10, 8, 4.0, 0.1), "beta 0.1 and num_channels 8: at least one channel"),
        ((10, 8, 4.0, 0.8, "code"), "rule is 'code': it must be 'pseudo_code' or 'equation'"),
    ],
)
def test_dtr_mask_names_the_bad_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        dtr_mask(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8, 0.8, 0), "num_timesteps is 1"),
        ((10, 8, 0.0, 0), "beta is 0.0"),
        ((10, 8, 0.1, 0), "at least one channel"),
        ((10, 8, 0.8, -1), "seed is -1: it must be 0 or above"),
    ],
)
def test_random_mask_names_the_bad_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_mask(*arguments)


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
def test_random_rows_share_the_hypergeometric_expectation_of_channels(beta):
    T, C = 400, 48
    on = int(beta * C)
    shared = [k * math.comb(on, k) * math.comb(C - on, on - k) / math.comb(C, on) for k in range(on + 1)]
    expected = sum(shared)  # DTR, eq. (9)
    assert expected == pytest.approx(on**2 / C)
    for mask in (random_mask(T, C, beta, seed=2), max_roaming_mask(T, C, beta, seed=2, num_moves=9)):
        overlap = mask.double() @ mask.double().T
        assert (overlap.diagonal() == on).all()
        for distance in (1, 5, 100):  # near and far timesteps alike
            pairs = overlap.diagonal(distance)
            deviation = (on**2 / C * (1 - on / C) ** 2 * C / (C - 1) / len(pairs)) ** 0.5
            assert abs(pairs.mean() - expected) < 4 * deviation


def roaming(num_moves, num_timesteps=12, num_channels=20, beta=0.3, seed=4):
    return max_roaming_mask(num_timesteps, num_channels, beta, seed, num_moves)


def test_masks_that_roam_begin_as_random_ones():
    assert torch.equal(roaming(0), random_mask(12, 20, 0.3, 4))


@given(st.integers(0, 10_000))
def test_a_move_exchanges_one_channel_of_each_timestep(num_moves):
    before, after = roaming(num_moves), roaming(num_moves + 1)
    assert (after.sum(dim=1) == 6).all()
    assert ((before & ~after).sum(dim=1) == 1).all()
    assert ((after & ~before).sum(dim=1) == 1).all()


@given(st.integers(0, 100))
@settings(deadline=None)
def test_roaming_visits_all_channels_and_takes_the_one_off_for_the_longest(first):
    masks = [roaming(first + move) for move in range(20 - 6 + 1)]
    assert torch.stack(masks).any(dim=0).all()  # within C - width moves
    off_since = torch.zeros(12, 20)
    for before, after in itertools.pairwise(masks):
        off_since = torch.where(before, 0, off_since + 1)
        enters = after & ~before
        never_sooner = torch.where(before, 0, off_since).amax(dim=1)
        assert (off_since[enters] == never_sooner).all()


def test_timesteps_roam_on_ways_of_their_own():
    moves = [roaming(move) for move in range(15)]
    ways = torch.stack([(after & ~before).int().argmax(dim=1) for before, after in itertools.pairwise(moves)])
    assert len(ways.unique(dim=1).T) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 8, 0.0, 0, 0), "beta is 0.0"),
        ((10, 8, 0.8, -2, 0), "seed is -2"),
        ((10, 8, 0.8, 0, -1), "num_moves is -1: it must be 0 or above"),
    ],
)
def test_max_roaming_mask_names_the_bad_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        max_roaming_mask(*arguments)


@given(timesteps, channels, alphas, betas, st.integers(2, 16))
@settings(deadline=None)
def test_a_clustered_mask_is_the_one_of_as_many_tasks_over_uniform_intervals(
    num_timesteps, num_channels, alpha, beta, num_clusters
):
    assume(int(beta * num_channels) >= 1 and num_clusters <= num_timesteps)
    mask = clustered_mask(num_timesteps, num_channels, alpha, beta, num_clusters)
    tasks = dtr_mask(num_clusters, num_channels, alpha, beta)
    assert mask.shape == (num_timesteps, num_channels)
    for task, (start, stop) in zip(tasks, uniform_bounds(num_timesteps, num_clusters), strict=True):
        assert (mask[start:stop] == task).all()


def test_a_cluster_for_each_timestep_is_dtr():
    assert torch.equal(clustered_mask(30, 24, 4.0, 0.5, 30), dtr_mask(30, 24, 4.0, 0.5))


@given(timesteps, channels, st.floats(0, 1, exclude_max=True), st.integers(1, 16))
@settings(deadline=None)
def test_explicit_clusters_share_some_channels_and_divide_the_others_evenly(
    num_timesteps, num_channels, shared, num_clusters
):
    num_shared = int(shared * num_channels)
    assume(num_clusters <= num_timesteps and num_clusters <= num_channels - num_shared)
    mask = explicit_clustered_mask(num_timesteps, num_channels, shared, num_clusters)
    assert mask.shape == (num_timesteps, num_channels)
    assert mask[:, :num_shared].all()
    rows = [mask[start:stop] for start, stop in uniform_bounds(num_timesteps, num_clusters)]
    assert all((part == part[0]).all() for part in rows)
    own = torch.stack([part[0] for part in rows])[:, num_shared:]
    assert (own.sum(dim=0) == 1).all()
    counts = own.sum(dim=1)
    assert counts.max() - counts.min() <= 1


def test_half_of_the_channels_shared_over_8_clusters_is_the_papers_setting():
    mask = explicit_clustered_mask(1000, 768, 0.5, 8)
    assert (mask.sum(dim=1) == 384 + 48).all()
    assert mask[124].logical_xor(mask[125]).sum() == 96
    assert torch.equal(mask[0], mask[124])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clustered_mask(10, 8, 4.0, 0.8, 1), "num_clusters is 1: it must be at least 2"),
        (lambda: clustered_mask(10, 8, 4.0, 0.8, 11), "num_clusters is 11: it must be from 1 to 10"),
        (lambda: explicit_clustered_mask(10, 8, 1.0, 2), r"shared is 1.0: it must be in \[0, 1\)"),
        (lambda: explicit_clustered_mask(10, 8, 0.5, 5), "num_clusters is 5: .* the 4 channels"),
        (lambda: explicit_clustered_mask(10, 80, 0.5, 11), "num_clusters is 11: it must be from 1 to 10"),
        (lambda: explicit_clustered_mask(10, 8, 0.5, 0), "num_clusters is 0"),
    ],
)
def test_clustered_masks_name_the_bad_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.floats(0.01, 20), st.floats(0.01, 20), st.floats(0, 1), st.booleans())
def test_in_between_lies_between_and_the_ends_are_exact(first, last, share, ratios):
    assert between(first, last, 0.0, ratios=ratios) == first
    assert between(first, last, 1.0, ratios=ratios) == last
    assert between(first, first, share, ratios=ratios) == first
    low, high = sorted((first, last))
    assert low * (1 - 1e-12) <= between(first, last, share, ratios=ratios) <= high * (1 + 1e-12)


def test_in_between_goes_in_equal_differences_or_equal_ratios():
    assert between(1.0, 16.0, 0.5, ratios=True) == pytest.approx(4.0)
    assert between(1.0, 0.8, 0.25) == pytest.approx(0.95)
