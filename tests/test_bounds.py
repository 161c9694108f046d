import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_ray.bounds import uniform_bounds


@given(st.integers(1, 2000), st.data())
def test_bounds_cover_the_timesteps_in_order_as_evenly_as_can_be(num_timesteps: int, data: st.DataObject):
    num_clusters = data.draw(st.integers(1, min(num_timesteps, 200)))
    bounds = uniform_bounds(num_timesteps, num_clusters)
    assert [t for start, stop in bounds for t in range(start, stop)] == list(range(num_timesteps))
    lengths = [stop - start for start, stop in bounds]
    assert len(lengths) == num_clusters
    assert 1 <= min(lengths) <= max(lengths) <= min(lengths) + 1


@pytest.mark.parametrize("num_clusters", [0, -1, 11])
def test_there_is_a_timestep_for_each_interval(num_clusters: int):
    with pytest.raises(
        ValueError, match=f"num_clusters is {num_clusters}: it must be from 1 to 10 timesteps"
    ):
        uniform_bounds(10, num_clusters)
