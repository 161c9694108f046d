"""The order of training images."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.data.order import batch_indices


@settings(max_examples=60, deadline=None)
@given(num_images=st.integers(1, 60), batch_size=st.integers(1, 90), seed=st.integers(0, 2**40))
def test_every_image_is_seen_once_an_epoch(num_images: int, batch_size: int, seed: int) -> None:
    num_steps = 3 * num_images // batch_size + 1
    batches = [batch_indices(num_images, batch_size, step, seed) for step in range(num_steps)]
    assert all(b.shape == (batch_size,) and b.dtype == torch.int64 for b in batches)
    order = torch.cat(batches)
    for start in range(0, len(order) - num_images + 1, num_images):
        assert order[start : start + num_images].sort().values.tolist() == list(range(num_images))


def test_any_step_can_be_drawn_without_those_before() -> None:
    forward = [batch_indices(1000, 64, step, 3) for step in range(40)]
    backward = [batch_indices(1000, 64, step, 3) for step in reversed(range(40))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_epochs_and_seeds_differ() -> None:
    orders = [batch_indices(100, 100, epoch, seed).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
