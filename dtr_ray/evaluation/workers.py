"""run_group: several processes of one machine that evaluate together, and end together."""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from dtr_ray.config.errors import is_refusal
from dtr_ray.distributed import Group

Work = Callable[..., Any]
_ERROR, _RESULT = "error.json", "result.json"
_REFUSED = 2


def default_workers() -> int:
    """A worker for each GPU that PyTorch sees; one on a CPU, which its own threads fill."""
    return max(1, torch.cuda.device_count())


def check_workers(num_workers: int) -> None:
    """Raises ValueError where this machine has no place for so many workers."""
    gpus = torch.cuda.device_count()
    if num_workers < 1:
        raise ValueError(f"--workers is {num_workers}: it must be at least 1")
    if 0 < gpus < num_workers:
        raise ValueError(f"--workers is {num_workers}, but PyTorch sees {gpus} GPU{'s' if gpus > 1 else ''}")


def run_group(work: Work, arguments: tuple[Any, ...], num_workers: int) -> Any:
    """What `work(group, device, *arguments)` returns on the main worker.

    One worker is this process. Several are processes of their own, one a GPU (nccl), or sharing the CPU's
    cores (gloo); when one fails, or this process is interrupted, all are ended.

    Args:
        work: a function of a module, the same on all workers.
        arguments: can be pickled; the result is of what JSON knows.
        num_workers: at least 1, with GPUs no more than there are.

    Raises:
        ValueError: raised by `work` on some worker.
        RuntimeError: a worker failed in another way.
    """
    if num_workers == 1:
        return work(Group(), torch.device("cuda" if torch.cuda.is_available() else "cpu"), *arguments)
    # It tells of every process that it ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dtr_ray-") as folder:
        # It has no types.
        start: Any = start_processes
        context = start(_run, (work, arguments, num_workers, folder), num_workers, join=False)
        try:
            while not context.join():
                pass
        except ProcessException as error:
            refused = Path(folder, _ERROR)
            if refused.exists():
                raise ValueError(json.loads(refused.read_text(encoding="utf-8"))) from None
            raise RuntimeError(f"a worker failed: {error}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return json.loads(Path(folder, _RESULT).read_text(encoding="utf-8"))


def _run(rank: int, work: Work, arguments: tuple[Any, ...], num_workers: int, folder: str) -> None:
    """One worker."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_workers))
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    store = Path(folder, "store").as_uri()
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=num_workers)
    try:
        found = work(Group.current(), device, *arguments)
    except ValueError as error:
        if not is_refusal(error):
            raise
        _write(Path(folder, _ERROR), str(error), rank)
        # At once: the others, which may wait for this one, are ended by the process that started them.
        os._exit(_REFUSED)
    if rank == 0:
        _write(Path(folder, _RESULT), found, rank)
    dist.destroy_process_group()


def _write(path: Path, value: Any, rank: int) -> None:
    temporary = path.with_name(f"{rank}-{path.name}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
