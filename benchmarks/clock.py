"""The clock of the benchmarks."""

import time
from collections.abc import Callable

import torch


def seconds(step: Callable[[], object], device: torch.device | str, repeats: int) -> float:
    """Time of one call: the process's own on the CPU, wall time on a GPU."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    for _ in range(repeats):
        step()
    if not on_cpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats
