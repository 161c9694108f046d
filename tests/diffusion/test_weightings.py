"""Weights of timesteps against the authors' numbers, and their ranges."""

import numpy as np
import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.config.weighting import MinSNRWeighting, P2Weighting, UWWeighting, VanillaWeighting
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.diffusion.weightings import build_weights, min_snr_weights, p2_weights

SCHEDULES = ["cosine", "linear"]
quick = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.mark.parametrize(
    ("config", "golden_name"),
    [(MinSNRWeighting(gamma=5), "min_snr_5"), (P2Weighting(gamma=1, k=1), "p2weight_1_1")],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_equal_the_authors(name, config, golden_name):
    weights = build_weights(config, noise_schedule(name, 1000))
    torch.testing.assert_close(weights, load("losses")[0][f"{name}_{golden_name}_weight"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("config", [VanillaWeighting(), UWWeighting()])
def test_no_weights_where_every_timestep_counts_the_same(config):
    assert build_weights(config, noise_schedule("cosine", 1000)) is None


@quick
@given(
    st.sampled_from(SCHEDULES),
    st.integers(21, 2000),
    st.floats(0.01, 100),
    st.floats(0, 5),
    st.floats(0.01, 10),
)
def test_weights_are_positive_and_finite(name, num_timesteps, cap, gamma, k):
    snr = noise_schedule(name, num_timesteps).snr
    for weights in (min_snr_weights(snr, cap), p2_weights(snr, gamma, k)):
        assert weights.shape == (num_timesteps,)
        assert weights.isfinite().all()
        assert (weights > 0).all()
    assert min_snr_weights(snr, cap).max() <= 1


@pytest.mark.parametrize(
    "function", [lambda snr: min_snr_weights(snr, 5.0), lambda snr: p2_weights(snr, 1.0, 1.0)]
)
def test_arrays_and_tensors_give_the_same(function):
    snr = noise_schedule("cosine", 100).snr
    from_array = function(snr.numpy())
    assert isinstance(from_array, np.ndarray)
    np.testing.assert_allclose(from_array, function(snr).numpy(), rtol=1e-15)


def test_parameters_out_of_range_are_refused():
    snr = torch.ones(3)
    with pytest.raises(ValueError, match=r"gamma is 0.*above 0"):
        min_snr_weights(snr, 0)
    with pytest.raises(ValueError, match=r"gamma is -1.*at least 0"):
        p2_weights(snr, -1, 1)
    with pytest.raises(ValueError, match=r"k is 0.*above 0"):
        p2_weights(snr, 1, 0)
