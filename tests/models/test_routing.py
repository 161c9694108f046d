"""Masks: against the authors' code, and what every mask keeps to."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtr_ray.config import TrialConfig
from dtr_ray.models.routing import build_mask, dtr_mask, random_mask

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
    assert random_mask(10, 8, 1.0, 0).all()


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


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        ({"name": "none"}, None),
        ({"name": "dtr", "alpha": 2, "beta": 0.5}, dtr_mask(20, 16, 2.0, 0.5)),
        ({"name": "random", "beta": 0.5, "seed": 7}, random_mask(20, 16, 0.5, 7)),
    ],
)
def test_every_routing_configuration_builds_its_mask(routing, expected):
    mask = build_mask(TrialConfig.from_dict({"routing": routing}).routing, 20, 16)
    assert mask is expected if expected is None else torch.equal(mask, expected)
