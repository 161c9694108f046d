"""Layers on their own, against formulas written out another way."""

import math

import pytest
import torch
import torch.nn.functional as F

from dtr_ray.models.layers import Attention, grid_positions, modulate, timestep_waves


@pytest.mark.parametrize("num_tokens", [4, 64])
def test_attention_in_bfloat16_is_torchs_within_rounding(num_tokens):
    torch.manual_seed(0)
    layer = Attention(32, 4)
    x = torch.randn(3, num_tokens, 32)
    q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2))
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.01 * expected.norm()


def test_modulation_scales_by_one_more_and_shifts():
    x = torch.randn(2, 3, 4)
    shift, scale = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale[:, None]) + shift[:, None])


def test_timestep_waves_are_cosines_then_sines_from_frequency_one_down():
    waves = timestep_waves(torch.tensor([0, 7]), 8)
    assert waves[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [f(7 * w) for f in (math.cos, math.sin) for w in frequencies]
    assert waves[1].tolist() == pytest.approx(expected, abs=1e-6)


def test_grid_positions_hold_the_column_then_the_row():
    positions = grid_positions(3, 8)[0]
    assert positions.shape == (9, 8)
    assert positions.dtype == torch.float32
    column, row = 2, 1
    expected = [
        wave(place * frequency)
        for place in (column, row)
        for wave in (math.sin, math.cos)
        for frequency in (1, 0.01)
    ]
    assert positions[3 * row + column].tolist() == pytest.approx(expected, abs=1e-7)
