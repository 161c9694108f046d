"""Stopwatch: where the time of an evaluation goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds that parts of a computation take on a device.

    A GPU works while the host goes on, so there its own events tell the time; nobody waits for them before
    `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._started = time.perf_counter()
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def part(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Adds what runs in it to a part; `on_host`: it ends when the host is done, also with a GPU."""
        if self._on_gpu and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        started = time.perf_counter()
        yield
        self._host[name] = self._host.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of every part, and under `waiting` what of the time since the start is in none of them."""
        if self._events:
            torch.cuda.synchronize()
        total = time.perf_counter() - self._started
        found = dict(self._host)
        for name, start, end in self._events:
            found[name] = found.get(name, 0.0) + start.elapsed_time(end) / 1000
        return {**found, "waiting": max(total - sum(found.values()), 0.0)}
