"""Runs the independent parts of a computation as Ray tasks; it does not know what they compute."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from dtr_ray.service import cluster
from dtr_ray.service.worker import enter

Part = TypeVar("Part")
Result = TypeVar("Result")

# Times that a part whose process or machine was lost is run again.
RETRIES = 3


def run_parts(
    work: Callable[[Part, str], Result], parts: Sequence[Part], num_workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Calls `work(part, device)` for each part on Ray's workers, and yields (number of the part, result).

    Results come as they are ready, in any order. A part takes a GPU where the cluster has any, else a CPU. A
    part whose process or machine is lost is run again; an error of its own is raised here as it is, and no
    further part is started.

    Args:
        work: of a module, so that workers can import it.
        parts: what can be pickled, at least 1.
        num_workers: parts side by side at most, at least 1; default: as many as the cluster has GPUs (CPUs).

    Raises:
        ValueError: `num_workers` is below 1, or the cluster does not answer.
        RuntimeError: a part's process was lost too often.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}: it must be at least 1")
    cluster.connect(dashboard=False)
    machines = cluster.nodes()
    num_gpus = int(sum(machine.gpus for machine in machines))
    room = num_gpus or int(sum(machine.cpus for machine in machines)) or 1
    limit = min(num_workers or room, len(parts))
    task: Any = ray.remote(_run).options(
        num_cpus=0 if num_gpus else 1, num_gpus=1 if num_gpus else 0, max_retries=RETRIES
    )
    device, folder = "cuda" if num_gpus else "cpu", str(Path.cwd())
    running: dict[Any, int] = {}
    left = iter(range(len(parts)))
    try:
        while True:
            while len(running) < limit and (number := next(left, None)) is not None:
                running[task.remote(work, parts[number], device, folder)] = number
            if not running:
                return
            (ready, *_), _ = ray.wait(list(running))
            yield running.pop(ready), answer(ready)
    finally:
        for reference in running:
            ray.cancel(reference)


def _run(work: Callable[[Part, str], Result], part: Part, device: str, folder: str) -> Result:
    """In a worker: relative paths mean what they mean to the caller, where the folder exists."""
    enter(folder)
    return work(part, device)


def answer(reference: Any) -> Any:
    """What a worker's task gave, or raised: its own error, not Ray's stand-in with the whole traceback.

    Raises:
        RuntimeError: the worker was lost, and those that followed it too.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise RuntimeError(f"a worker was lost {RETRIES + 1} times: {error}") from error
