"""The feature stage: order, bounds and errors of what runs beside the drawing of samples."""

import threading
import time

import pytest
import torch
from torch import Tensor

from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.overlap import FeatureStage
from dtr_ray.evaluation.timing import Stopwatch

CPU = torch.device("cpu")


class Slow(Extractor):
    """Prepares slowly, and less and less so; keeps what it has been given, and by which thread."""

    name = "slow"
    num_features = 1
    num_classes = 1
    prepares_on_cpu = True
    _chunk_images = 10

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__("cpu")
        self.prepared: list[int] = []
        self.threads: set[str] = set()
        self._fail_at = fail_at

    def _prepare(self, images: Tensor) -> Tensor:
        number = int(images[0, 0, 0, 0])
        time.sleep(0.01 / (1 + number))
        if number == self._fail_at:
            raise OSError(f"block {number} cannot be resized")
        self.prepared.append(number)
        self.threads.add(threading.current_thread().name)
        return images

    def _features(self, prepared: Tensor) -> Tensor:
        assert threading.current_thread() is threading.main_thread()
        return prepared[:, :1, 0, 0].float()

    def _logits(self, features: Tensor) -> Tensor:
        return features


def blocks(count: int) -> list[Tensor]:
    return [torch.full((2, 1, 3, 3), number, dtype=torch.uint8) for number in range(count)]


@pytest.mark.parametrize("threaded", [True, False])
def test_features_come_in_order(threaded: bool):
    extractor = Slow()
    with FeatureStage(extractor, Stopwatch(CPU), max_waiting=3, threaded=threaded) as stage:
        for images in blocks(8):
            stage.add(images)
        found = stage.finish()
    assert [features.tolist() for features in found] == [[[i], [i]] for i in map(float, range(8))]
    assert (extractor.threads == {threading.main_thread().name}) is not threaded


def test_no_more_blocks_wait_than_allowed():
    extractor, added = Slow(), 0
    with FeatureStage(extractor, Stopwatch(CPU), max_waiting=2, threaded=True) as stage:
        for added, images in enumerate(blocks(6), 1):
            stage.add(images)
            assert added - len(extractor.prepared) <= 2
        assert added == 6
        assert len(stage.finish()) == 6


def feed(extractor: Extractor, max_waiting: int, interrupted: bool = False) -> None:
    """Eight blocks through a stage."""
    with FeatureStage(extractor, Stopwatch(CPU), max_waiting=max_waiting, threaded=True) as stage:
        for images in blocks(8):
            stage.add(images)
        if interrupted:
            raise KeyboardInterrupt
        stage.finish()


def test_an_error_of_the_thread_reaches_the_caller_and_nothing_runs_on():
    extractor, before = Slow(fail_at=2), threading.active_count()
    with pytest.raises(OSError, match="block 2 cannot be resized"):
        feed(extractor, max_waiting=1)
    assert len(extractor.prepared) < 8
    assert threading.active_count() == before


def test_an_error_of_the_caller_ends_the_thread():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        feed(Slow(), max_waiting=9, interrupted=True)
    assert threading.active_count() == before


def test_the_stopwatch_adds_up_its_parts_and_calls_the_rest_waiting():
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.part("sleeping"):
            time.sleep(0.01)
    time.sleep(0.01)
    seconds = stopwatch.seconds()
    assert set(seconds) == {"sleeping", "waiting"}
    assert seconds["sleeping"] >= 0.02
    assert seconds["waiting"] >= 0.01
