"""Intervals cover all timesteps, and timesteps are drawn evenly from them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.diffusion.intervals import stratified_timesteps, uniform_intervals

quick = settings(derandomize=True, deadline=None, max_examples=60)
sizes = st.integers(1, 1500).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


@quick
@given(sizes)
def test_uniform_intervals_cover_all_timesteps_in_order(size):
    num_timesteps, num_clusters = size
    intervals = uniform_intervals(num_timesteps, num_clusters)
    assert [t for start, stop in intervals for t in range(start, stop)] == list(range(num_timesteps))
    widths = [stop - start for start, stop in intervals]
    assert len(widths) == num_clusters
    assert min(widths) >= 1
    assert max(widths) - min(widths) <= 1


def test_uniform_intervals_are_the_authors_where_those_lose_nothing():
    for num_clusters in (5, 7, 8):
        bounds = [int(1000 / num_clusters * i) for i in range(num_clusters + 1)]
        assert uniform_intervals(1000, num_clusters) == list(itertools.pairwise(bounds))


@pytest.mark.parametrize("num_clusters", [0, -1, 11])
def test_a_number_of_clusters_that_cannot_be_is_refused(num_clusters):
    with pytest.raises(ValueError, match=f"{num_clusters}: it must be from 1 to 10"):
        uniform_intervals(10, num_clusters)


@quick
@given(sizes, st.integers(1, 70), st.integers(0, 1000))
def test_stratified_timesteps_lie_in_their_intervals_in_order(size, batch_size, seed):
    intervals = uniform_intervals(*size)
    t, cluster = stratified_timesteps(intervals, batch_size, torch.Generator().manual_seed(seed))
    assert t.dtype == cluster.dtype == torch.int64
    assert t.shape == cluster.shape == (batch_size,)
    assert (cluster.diff() >= 0).all()
    for step, place in zip(t.tolist(), cluster.tolist(), strict=True):
        start, stop = intervals[place]
        assert start <= step < stop
    if batch_size >= len(intervals):
        assert cluster.tolist() == [i * len(intervals) // batch_size for i in range(batch_size)]


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_stratified_timesteps_reach_every_timestep_evenly(batch_size):
    intervals = uniform_intervals(24, 8)
    generator = torch.Generator().manual_seed(0)
    draws = [stratified_timesteps(intervals, batch_size, generator)[0] for _ in range(24_000 // batch_size)]
    share = torch.bincount(torch.cat(draws), minlength=24) * 24 / 24_000
    # 20 samples over 8 clusters give some clusters 2 and others 3.
    assert 0.7 < share.min() <= share.max() < 1.3


def test_the_same_generator_gives_the_same_timesteps():
    intervals = uniform_intervals(1000, 8)
    a, b = (stratified_timesteps(intervals, 64, torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(a, b)
