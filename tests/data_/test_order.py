"""The order of training images."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.data.order import batch_indices
from dtr_ray.distributed import Group


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


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 50),
    shares=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    share_size=st.integers(1, 9),
    stop=st.integers(0, 30),
    seed=st.integers(0, 2**40),
)
def test_workers_that_stop_anywhere_and_go_on_as_others_lose_and_repeat_no_image(
    num_images: int, shares: tuple[int, int], share_size: int, stop: int, seed: int
) -> None:
    # A run of some workers is killed after `stop` steps, and gone on with by others in number.
    batch_size = shares[0] * shares[1] * share_size
    num_steps = stop + 2 * num_images // batch_size + 2
    seen = []
    for step in range(num_steps):
        world_size = shares[0] if step < stop else shares[1]
        indices = batch_indices(num_images, batch_size, step, seed)
        parts = [Group(rank, world_size).slice(indices) for rank in range(world_size)]
        assert {len(part) for part in parts} == {batch_size // world_size}
        seen += parts
    order = torch.cat(seen)
    assert torch.equal(order, batch_indices(num_images, len(order), 0, seed))
    for start in range(0, len(order) - num_images + 1, num_images):
        assert order[start : start + num_images].sort().values.tolist() == list(range(num_images))


@pytest.mark.parametrize("epoch", [0, 7])
def test_an_epoch_of_imagenet_s_size_costs_little(epoch: int) -> None:
    steps = range(epoch * 1_281_167 // 256, epoch * 1_281_167 // 256 + 20)
    started = time.process_time()
    first = batch_indices(1_281_167, 256, steps[0], seed=epoch)
    drawn = time.process_time()
    rest = [batch_indices(1_281_167, 256, step, seed=epoch) for step in steps[1:]]
    done = time.process_time()
    # Measured: 0.04 s for the permutations, 20 us a step after them.
    assert drawn - started < 1
    assert done - drawn < 0.1
    assert torch.cat([first, *rest]).unique().numel() > 19 * 256
