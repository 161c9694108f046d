"""The doctor's checks of the machines themselves: GPUs, disks, memory, limits and clocks."""

import shutil
from collections.abc import Iterator
from resource import RLIMIT_NOFILE, getrlimit
from typing import Any

from dtr_ray.service import cluster
from dtr_ray.service.cluster_answers import Case
from dtr_ray.service.findings import Finding, fail, ok, warning
from dtr_ray.weights.narrator import size

_GB = 1e9
_CLOCK_WARNING_S, _CLOCK_FAIL_S = 2.0, 60.0
# Ray starts its store with no less.
_LEAST_STORE_BYTES = 80e6
# Ray writes nothing more to a disk that is fuller than this (local_fs_capacity_threshold).
_FULLEST = 0.95
_LEAST_OPEN_FILES = 4096
_OTHER_OPEN_FILES = 1000


def check_gpus(case: Case) -> Iterator[Finding]:
    """PyTorch can use the GPUs that are there, and a trial's workers can speak to one another over them."""
    resources = None if case.config is None else case.config.resources
    wanted = resources is not None and resources.gpus_per_worker > 0
    several = resources is not None and resources.workers_per_trial > 1
    kinds: dict[str, int] = {}
    for machine, found in case.facts("gpu"):
        if not found["present"]:
            continue
        trouble = _gpu_trouble(machine.gpus, found, several=several)
        if trouble is not None:
            report = fail if wanted or machine.gpus else warning
            yield report(f"{machine.name}: {trouble[0]}", trouble[1])
            continue
        text = f"{found['count']} x {found['names'][0]} (driver {found['driver']}, CUDA {found['cuda']}"
        text += f", NCCL {found['nccl']})"
        kinds[text] = kinds.get(text, 0) + 1
    for text, count in kinds.items():
        yield ok(f"{count} machine{'s' * (count > 1)} with {text}")
    if not kinds and not wanted:
        yield ok("none, and none is asked for")
    elif not kinds and resources is not None and resources.autoscaling:
        yield ok("no machine with a GPU is up yet: they come with the trials")


def _gpu_trouble(counted: float, found: dict[str, Any], *, several: bool) -> tuple[str, str] | None:
    """What is wrong with a machine's GPUs, of which Ray has `counted` so many, and the mend; or None."""
    count, cuda = int(found["count"]), found.get("cuda")
    if not cuda:
        return "a GPU, but a PyTorch without CUDA", "install PyTorch's build for CUDA there"
    if found["fault"] or not count:
        version, why = found["driver"] or "unknown", found["fault"] or "PyTorch sees no GPU"
        mend = f"install an NVIDIA driver that has CUDA {cuda}, and give the container its GPUs"
        return f"{why} (NVIDIA driver {version}, PyTorch for CUDA {cuda})", mend
    if found["unsupported"]:
        kinds = ", ".join(found["unsupported"])
        return f"this PyTorch has no code for {kinds}", "install a build of PyTorch for these GPUs"
    if several and found["nccl"] is None:
        return "this PyTorch has no NCCL", "install PyTorch's build for CUDA and Linux"
    if counted > count:
        mend = f"start Ray there with --num-gpus={count}"
        return f"Ray counts {counted:g} GPUs, PyTorch {count}", mend
    return None


def check_disk(case: Case) -> Iterator[Finding]:
    """There is room for checkpoints, for the cache of data and weights, and for Ray's own files."""
    existing = next(path for path in (case.output, *case.output.parents) if path.exists())
    free, need = shutil.disk_usage(existing).free, _sweep_bytes(case)
    text = f"{size(free)} free for {case.output}"
    if need:
        text += f"; the sweep takes up to {size(need)}"
    mend = "free space there, or choose another storage.output"
    yield fail(text, mend) if free < need else warning(text, mend) if free < 2 * need + _GB else ok(text)
    least = None
    for machine, found in case.facts("space"):
        for key, what in (("cache", "DTR_RAY_CACHE"), ("temp", "RAY_TMPDIR")):
            path, free, total = found[key]
            text = f"{machine.name}: {size(free)} of {size(total)} free for {path}"
            mend = f"free space there, or set {what} to a larger disk"
            if key == "temp" and free < (1 - _FULLEST) * total:
                yield fail(f"{text}: Ray stops writing when a disk is {_FULLEST:.0%} full", mend)
            elif free < _GB:
                yield fail(text, mend)
            elif free < 5 * _GB:
                yield warning(text, mend)
            elif least is None or free < least[0]:
                least = (free, text)
    if least is not None:
        yield ok(f"{least[1]}, the least of caches and temporary folders")


def check_object_store(case: Case) -> Iterator[Finding]:
    """Ray's object store fits into shared memory."""
    seen = 0
    for machine, found in case.facts("space"):
        if "shm" not in found:
            continue
        free = found["shm"][1]
        text = f"{machine.name}: {size(free)} of shared memory free"
        if machine.object_store_bytes > found["shm"][2]:
            store = size(machine.object_store_bytes)
            yield warning(
                f"{machine.name}: Ray's object store of {store} is larger than its shared memory",
                "give the container more (--shm-size), or start Ray with a smaller --object-store-memory",
            )
        elif not machine.object_store_bytes and free < _LEAST_STORE_BYTES:
            yield warning(
                text, "give the container more (--shm-size): Ray's object store lies on disk otherwise"
            )
        else:
            seen += 1
    if seen:
        yield ok(f"shared memory holds Ray's object store on {seen} machine{'s' * (seen > 1)}")


def check_open_files(case: Case) -> Iterator[Finding]:
    """A process may have enough files and connections open."""
    limits = {machine.name: limit for machine, limit in case.facts("open files")}
    trials = 0 if case.config is None else case.config.search.num_trials
    need, here = trials + _OTHER_OPEN_FILES, getrlimit(RLIMIT_NOFILE)[0]
    mend = "type `ulimit -n 65536` before the sweep, and before `ray start`"
    if 0 <= here < need:
        yield warning(f"{here} files a process here, and a sweep of {trials} trials may want {need}", mend)
    low = {name: limit for name, limit in limits.items() if limit < _LEAST_OPEN_FILES}
    for name, limit in low.items():
        yield warning(f"{name}: {limit} files a process of Ray's", mend)
    if not low and limits:
        least = min(limits.values())
        yield ok(f"at least {least} files a process" if least < 2**31 else "no limit")


def check_clock(case: Case) -> Iterator[Finding]:
    """The machines' clocks agree: times of records and of signs of life are compared."""
    worst = 0.0
    for machine in case.machines:
        low, high = machine.clock_s
        off = low if low > 0 else -high if high < 0 else 0.0
        worst = max(worst, off)
        way = "ahead of" if low > 0 else "behind"
        text = f"{machine.name}: its clock is at least {off:.1f} s {way} this one"
        mend = "run a time service there (chrony, or systemd-timesyncd)"
        if off > _CLOCK_WARNING_S:
            yield (fail if off > _CLOCK_FAIL_S else warning)(text, mend)
    if case.machines and worst <= _CLOCK_WARNING_S:
        alone = case.address is None or len(case.machines) == 1
        yield ok("one machine, one clock" if alone else f"clocks agree within {_CLOCK_WARNING_S:g} s")


def _sweep_bytes(case: Case) -> float:
    from dtr_ray.service.plan import make_plan

    return 0.0 if case.config is None else make_plan(case.config, cluster.local_nodes()).storage.total
