"""Prefetch: what the coming steps need is made by a thread of its own, while the steps before them run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from dtr_ray.training.batches import Batch, Batches

_DEPTH = 2
"""Batches that wait, at most."""

Made = TypeVar("Made")


@contextmanager
def batches_ahead(
    batches: Batches, num_steps: int, *, always: bool = False
) -> Iterator[Callable[[int], Batch]]:
    """Gives the function from a 0-based step to its batch; the batch is the one of `batches.at`.

    With a GPU, a thread reads images ahead of the steps up to `num_steps`. On the CPU it would take its time
    from the steps, which have all cores busy.

    Args:
        batches: of the trial.
        num_steps: no batch of a later step is read.
        always: read ahead on the CPU too.
    """
    if batches.device.type == "cpu" and not always:
        yield batches.at
        return
    with Prefetch(batches.share, num_steps, device=batches.device) as shares:
        yield lambda step: batches.sent(shares.at(step))


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class Prefetch(Generic[Made]):
    """Makes things by their step; asked for in order, they are ready or under way.

    What is asked for depends on the step alone, so it does not matter who makes it, or when. An error is
    raised where the thing that it concerns is asked for. To be closed.
    """

    def __init__(
        self,
        make: Callable[[int], Made],
        num_steps: int,
        *,
        device: torch.device | str = "cpu",
        depth: int = _DEPTH,
    ) -> None:
        """Nothing is made yet; from the first step asked for on, at most `depth` things of steps ahead."""
        self._make, self._num_steps, self._depth = make, num_steps, depth
        device = torch.device(device)
        # A thread begins on the first GPU, whichever its process uses.
        self._gpu = (
            torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        )
        self._next = -1
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def at(self, step: int) -> Made:
        """What `make` gives for a step."""
        if self._thread is None or step != self._next:
            self.close()
            self._start(step)
        found = self._ready.get()
        self._free.release()
        self._next = step + 1
        if isinstance(found, _Failure):
            self.close()
            raise found.error
        return found

    def close(self) -> None:
        """Ends the thread, once it is done with what it makes."""
        if self._thread is None:
            return
        self._ended.set()
        self._free.release()
        self._thread.join()
        self._thread = None

    def _start(self, step: int) -> None:
        assert 0 <= step < self._num_steps
        self._ready: SimpleQueue[Made | _Failure] = SimpleQueue()
        self._free, self._ended = Semaphore(self._depth), Event()
        # A daemon: a run that is never closed must not keep its process from ending.
        self._thread = Thread(target=self._run, args=(step,), name="dtr_ray-prefetch", daemon=True)
        self._thread.start()

    def _run(self, first: int) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        for step in range(first, self._num_steps):
            self._free.acquire()
            if self._ended.is_set():
                return
            try:
                self._ready.put(self._make(step))
            except BaseException as error:  # raised again where it is asked for
                self._ready.put(_Failure(error))
                return
