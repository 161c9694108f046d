"""Batches that are read ahead: the same ones, in order, by a thread that always ends."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_trials import (
    WEIGHTINGS,
    KillAt,
    KilledError,
    Recorder,
    batches_of,
    digits,
    distances,
    final_state,
    tensors_of,
    tiny_config,
)

from dtr_ray.data import ImageData
from dtr_ray.training import loop, train
from dtr_ray.training.batches import Batch
from dtr_ray.training.prefetch import Prefetch, batches_ahead


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "dtr_ray-prefetch"]


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loop reads ahead on the CPU too."""
    monkeypatch.setattr(loop, "batches_ahead", lambda *args: batches_ahead(*args, always=True))


def assert_same(batch: Batch, other: Batch) -> None:
    for name in ("x", "conditions", "t", "noise", "cluster", "counts"):
        one, two = getattr(batch, name), getattr(other, name)
        assert (one is two is None) or (one.dtype == two.dtype and torch.equal(one, two))
    assert batch.spans == other.spans


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_batch_is_the_same_whoever_makes_it(weighting: str) -> None:
    batches = batches_of(tiny_config(weighting__name=weighting, data__horizontal_flip=True))
    with batches_ahead(batches, 9, always=True) as batch_at:
        # Resumed at 3; then, as no run does, back and forth.
        for step in (3, 4, 5, 6, 7, 8, 1, 2, 8, 0):
            assert_same(batch_at(step), batches.at(step))


def test_things_are_made_in_order_a_few_ahead_and_none_after_the_last() -> None:
    made: list[int] = []
    with Prefetch(lambda step: made.append(step) or step, num_steps=6, depth=2) as ahead:  # type: ignore[func-returns-value]
        assert made == []
        for step in range(6):
            assert ahead.at(step) == step
            deadline = time.monotonic() + 10
            while len(made) < min(6, step + 3) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert made == list(range(min(6, step + 3)))


def test_an_error_arrives_where_its_thing_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("the shard is gone")
        return step

    with Prefetch(make, num_steps=9) as ahead:
        assert [ahead.at(0), ahead.at(1)] == [0, 1]
        with pytest.raises(ValueError, match="the shard is gone"):
            ahead.at(2)
        assert ahead.at(5) == 5


def test_the_thread_ends_while_nobody_takes_what_it_made() -> None:
    ahead = Prefetch(lambda step: step, num_steps=10**9)
    assert ahead.at(0) == 0
    time.sleep(0.01)
    ahead.close()
    ahead.close()
    assert ahead.at(7) == 7
    ahead.close()


@pytest.mark.usefixtures("always_ahead")
def test_a_run_that_reads_ahead_is_the_run_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(weighting__name="ant_uw", evaluation__every_steps=3)
    data, observer = digits(config), Recorder()
    with pytest.raises(KilledError):
        list(train(config, tmp_path / "ahead", data, observer=KillAt(5)))
    reports = list(train(config, tmp_path / "ahead", data, observer=observer))
    monkeypatch.setattr(loop, "batches_ahead", batches_ahead)
    plain = Recorder()
    others = list(train(config, tmp_path / "plain", data, observer=plain))
    assert distances(reports) == distances(others)
    assert observer.losses[6] == plain.losses[6]
    one, two = (tensors_of(final_state(config, tmp_path / name)) for name in ("ahead", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.usefixtures("always_ahead")
def test_a_run_that_is_left_at_a_report_leaves_no_thread(tmp_path: Path) -> None:
    config = tiny_config(evaluation__every_steps=3)
    run = train(config, tmp_path, digits(config))
    next(run)
    assert "dtr_ray-prefetch" in {thread.name for thread in threading.enumerate()}
    run.close()


@pytest.mark.usefixtures("always_ahead")
def test_data_that_breaks_ends_the_run_at_that_step(tmp_path: Path) -> None:
    class Broken(ImageData):
        reads = 0

        def pixels(self, indices: torch.Tensor) -> torch.Tensor:
            self.reads += len(indices) == 12
            if self.reads > 3:
                raise ValueError("00002.npy cannot be read")
            return super().pixels(indices)

    whole, observer = digits(), Recorder()
    data = Broken(whole.pixels(torch.arange(1797)).numpy(), whole.labels, 10, whole.identity)
    with pytest.raises(ValueError, match=r"00002\.npy cannot be read"):
        list(train(tiny_config(), tmp_path, data, observer=observer))
    assert observer.steps == [1, 2, 3]


def test_on_the_cpu_nothing_is_read_ahead() -> None:
    batches = batches_of(tiny_config())
    with batches_ahead(batches, 3) as batch_at:
        assert_same(batch_at(0), batches.at(0))
        assert "dtr_ray-prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.gpu
def test_a_gpu_gets_the_batch_that_the_host_makes() -> None:
    config = tiny_config(weighting__name="ant_uw")
    from dtr_ray.training import TrainingState

    batches = batches_of(config, TrainingState.build(config, torch.device("cuda")))
    with batches_ahead(batches, 5) as batch_at:
        for step in range(5):
            batch = batch_at(step)
            assert batch.x.is_cuda
            assert_same(batch, batches.at(step))
    assert batches.share(0).x.is_pinned()
