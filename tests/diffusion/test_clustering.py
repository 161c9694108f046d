"""Interval clustering: the exact optimum, whatever the input."""

import itertools
import json
import math
import time

import golden
import numpy as np
import pytest
import torch

from dtr_ray.diffusion.clustering import affinity_costs, best_intervals, snr_costs
from dtr_ray.diffusion.intervals import affinity_intervals, snr_intervals
from dtr_ray.diffusion.noise import noise_schedule

ARRAYS, SETTINGS = golden.load("clustering")
SCHEDULES = json.loads((golden.FOLDER / "clustering_snr1000.json").read_text(encoding="utf-8"))


def snr_cost(snr, first, last):
    """The authors' objective, written out; both ends belong to the interval."""
    if first == last:
        return 0.0
    centre = round((first + last + 1) / 2)
    return math.fsum(abs(snr[i] - snr[centre]) for i in range(first, last + 1))


def affinity_cost(affinity, first, last):
    if first == last:
        return -1.0
    centre = (first + last + 1) // 2
    return -math.fsum(affinity[centre][i] for i in range(first, last + 1))


COSTS = {"snr": snr_cost, "affinity": affinity_cost}
FIND = {"snr": snr_intervals, "affinity": affinity_intervals}


def total(kind, values, intervals):
    return math.fsum(COSTS[kind](values, start, stop - 1) for start, stop in intervals)


def least_total(kind, values, num_clusters):
    """By trying every partition."""
    num_points = len(values)
    table = {
        (a, b): COSTS[kind](values, a, b - 1) for a, b in itertools.combinations(range(num_points + 1), 2)
    }
    cuts = itertools.combinations(range(1, num_points), num_clusters - 1)
    return min(math.fsum(table[p] for p in itertools.pairwise((0, *cut, num_points))) for cut in cuts)


def assert_covers(intervals, num_points, num_clusters):
    bounds = [0, *(stop for _, stop in intervals)]
    assert intervals == list(itertools.pairwise(bounds))
    assert len(intervals) == num_clusters
    assert bounds[-1] == num_points
    assert all(start < stop for start, stop in intervals)


def random_values(kind, num_points, style, rng):
    """Spread over decades, all alike, of few values (many ties), or in no order."""
    shape = (num_points,) if kind == "snr" else (num_points, num_points)
    if style == "ties":
        return rng.integers(0, 3, shape).astype(float)
    if style == "equal":
        return np.full(shape, 0.25)
    if kind == "affinity":
        return rng.uniform(-1, 1, shape)
    values = np.exp(4 * rng.standard_normal(shape))
    return np.sort(values)[::-1] if style == "falling" else values


@pytest.mark.parametrize("case", SETTINGS["cases"], ids=lambda case: f"{case['kind']}{case['index']}")
def test_golden_cases_reach_the_true_optimum(case):
    kind = "snr" if case["kind"] == "snr" else "affinity"
    values = ARRAYS[f"{case['kind']}{case['index']}"]
    intervals = FIND[kind](values, case["k"])
    assert_covers(intervals, case["n"], case["k"])
    assert total(kind, values.tolist(), intervals) == pytest.approx(case["true_optimum_cost"], rel=1e-9)
    assert [[start, stop - 1] for start, stop in intervals] == case["true_optimum_partition_inclusive"]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["schedule"])
def test_golden_schedules_of_1000_timesteps_reach_the_true_optimum(case):
    snr = noise_schedule(case["schedule"], 1000).snr
    intervals = snr_intervals(snr, case["k"])
    assert total("snr", snr.tolist(), intervals) == pytest.approx(case["true_optimum_cost"], rel=1e-9)
    assert [[start, stop - 1] for start, stop in intervals] == case["true_optimum_partition_inclusive"]


@pytest.mark.parametrize("style", ["falling", "any", "ties", "equal"])
@pytest.mark.parametrize("kind", ["snr", "affinity"])
def test_no_partition_costs_less(kind, style):
    rng = np.random.default_rng([len(style), len(kind)])
    # 250 inputs for each of the eight cases.
    for _ in range(250):
        num_points = int(rng.integers(1, 13))
        num_clusters = int(rng.integers(1, num_points + 1))
        values = random_values(kind, num_points, style, rng)
        intervals = FIND[kind](values, num_clusters)
        assert_covers(intervals, num_points, num_clusters)
        least = least_total(kind, values.tolist(), num_clusters)
        scale = max(1.0, float(np.abs(values).max()))
        assert total(kind, values.tolist(), intervals) == pytest.approx(least, rel=1e-12, abs=1e-12 * scale)


@pytest.mark.parametrize("kind", ["snr", "affinity"])
def test_the_cost_table_has_every_interval(kind):
    rng = np.random.default_rng(3)
    values = random_values(kind, 17, "any", rng)
    table = (snr_costs if kind == "snr" else affinity_costs)(values)
    for first, last in itertools.product(range(17), repeat=2):
        wanted = COSTS[kind](values.tolist(), first, last) if first <= last else math.inf
        assert table[first, last] == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_small_terms_are_not_lost_beside_large_ones():
    # Clustering the last points must not depend on the huge first ones; four, since a half is rounded to
    # the even neighbour.
    tail = np.sort(np.random.default_rng(0).uniform(1e-9, 1e-8, 12))[::-1]
    snr = np.concatenate([[1e9, 1e8, 1e7, 1e6], tail])
    intervals = snr_intervals(snr, 7)
    assert intervals[:4] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [(a - 4, b - 4) for a, b in intervals[4:]] == snr_intervals(tail, 3)


def test_ties_are_broken_the_same_way_always():
    # All partitions cost the same.
    assert best_intervals(np.where(np.tri(6, k=-1) > 0, np.inf, 0.0), 3) == [(0, 1), (1, 2), (2, 6)]
    assert snr_intervals(np.ones(5), 2) == [(0, 1), (1, 5)]


def test_arrays_lists_and_tensors_give_the_same():
    values = ARRAYS["snr1"]
    found = snr_intervals(values, 3)
    assert found == snr_intervals(values.numpy(), 3) == snr_intervals(values.tolist(), 3)
    affinity = ARRAYS["tas1"].clone().requires_grad_(True)
    assert affinity_intervals(affinity, 3) == affinity_intervals(affinity.tolist(), 3)


def test_as_many_clusters_as_points_and_one_for_all():
    assert snr_intervals([3.0, 2.0, 1.0], 3) == [(0, 1), (1, 2), (2, 3)]
    assert affinity_intervals(np.eye(4), 1) == [(0, 4)]
    assert snr_intervals([5.0], 1) == affinity_intervals([[1.0]], 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("find", "values", "num_clusters", "message"),
    [
        (snr_intervals, [1.0, 0.5], 0, "num_clusters is 0: it must be from 1 to 2"),
        (snr_intervals, [1.0, 0.5], 3, "num_clusters is 3: it must be from 1 to 2"),
        (affinity_intervals, torch.eye(4), -1, "num_clusters is -1: it must be from 1 to 4"),
        (snr_intervals, [[1.0]], 1, r"snr has shape \(1, 1\): it must be \(T,\)"),
        (snr_intervals, [], 1, r"snr has shape \(0,\)"),
        (snr_intervals, [1.0, math.nan], 1, "snr has the value nan"),
        (snr_intervals, [math.inf, 1.0], 1, "snr has the value inf"),
        (affinity_intervals, np.ones((3, 4)), 1, r"affinity has shape \(3, 4\): it must be \(T, T\)"),
        (affinity_intervals, np.ones(3), 1, r"affinity has shape \(3,\)"),
        (affinity_intervals, np.full((2, 2), -math.inf), 1, "affinity has the value -inf"),
    ],
)
def test_what_cannot_be_clustered_is_refused(find, values, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        find(values, num_clusters)


def test_1000_timesteps_and_16_clusters_take_under_a_second():
    affinity = np.random.default_rng(0).uniform(-1, 1, (1000, 1000))
    snr = noise_schedule("cosine", 1000).snr
    for find, values in ((snr_intervals, snr), (affinity_intervals, affinity)):
        # The best of three: the machine may be busy with something else.
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            assert_covers(find(values, 16), 1000, 16)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1
