"""FeatureStage: features of images while the next ones are drawn."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.timing import Stopwatch


class FeatureStage:
    """Turns blocks of images into features, in order.

    What an extractor does on the CPU (clean-fid's resize, which takes longer than Inception on a GPU) is done
    by threads while the GPU draws the next block. The networks' kernels are all launched by the caller's
    thread: torch's settings of precision are the whole process's, so two threads would change them under
    each other. On a CPU there is nothing to win by that (docs/evaluation.md), and all is done at once.

    Use as a context manager: nothing runs on after it. What goes wrong in a thread is raised by the next
    `add`, or by `finish`.
    """

    def __init__(
        self, extractor: Extractor, stopwatch: Stopwatch, *, max_waiting: int, threaded: bool
    ) -> None:
        """For at most `max_waiting` blocks without features; `threaded`: prepare them in the background."""
        self._extractor = extractor
        self._stopwatch = stopwatch
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, "features") if threaded else None
        self._waiting: deque[Future[Tensor]] = deque()
        self._found: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def add(self, images: Tensor) -> None:
        """The next images, uint8 (B, C, H, W), on any device."""
        if self._pool is None:
            with self._stopwatch.part("features"):
                self._found.append(self._extractor(images))
            return
        host, copied = _to_host(images)
        self._waiting.append(self._pool.submit(self._prepare, host, copied))
        while self._waiting and (len(self._waiting) > self._max_waiting or self._waiting[0].done()):
            self._take()

    def finish(self) -> list[Tensor]:
        """Features (B, D) of each block, in order, on the extractor's device."""
        while self._waiting:
            self._take()
        return self._found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _take(self) -> None:
        prepared = self._waiting.popleft().result()
        with self._stopwatch.part("features"):
            self._found.append(self._extractor.network(prepared))

    def _prepare(self, images: Tensor, copied: torch.cuda.Event | None) -> Tensor:
        if copied is not None:
            copied.synchronize()
        return self._extractor.prepare(images)


def _to_host(images: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and the event after which it is there; the GPU's next work does not hold it up."""
    if not images.is_cuda:
        return images, None
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
