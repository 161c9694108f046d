"""The doctor: looks at everything that a sweep stands on, and says what is wrong and how to mend it.

It starts no Ray and fetches nothing. Each check is a function from the case to findings, has a time limit,
and says so where it runs into it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from dtr_ray.data.narrator import size
from dtr_ray.service import cluster
from dtr_ray.service.cluster_answers import Case, Machine, ask_machines, find_address, join
from dtr_ray.service.findings import Finding, fail, in_a_line, ok, warning, within
from dtr_ray.service.installation import check_packages, check_python
from dtr_ray.service.node_checks import SHARED_PACKAGES
from dtr_ray.service.servers import check_mlflow, check_study

Check = Callable[[Case], Iterable[Finding]]

_GB = 1e9
_CLOCK_WARNING_S, _CLOCK_FAIL_S = 2.0, 60.0
# Ray starts its store with no less.
_LEAST_STORE_BYTES = 80e6
# Ray writes nothing more to a disk that is fuller than this (local_fs_capacity_threshold).
_FULLEST = 0.95
_LEAST_OPEN_FILES = 4096
_OTHER_OPEN_FILES = 1000
_LOOK = "the machines' own look"


@dataclass(frozen=True)
class NamedFinding:
    """A finding and the check that it is of."""

    check: str
    finding: Finding


def examine(case: Case) -> Iterator[NamedFinding]:
    """Runs all checks, one after the other; nothing that goes wrong in one ends another."""
    for name, (check, rounds) in CHECKS.items():
        limit_s = rounds * case.limit_s
        try:
            findings = within(limit_s, partial(_all, check, case))
        except TimeoutError:
            hint = "see whether what it asks hangs, or give it longer with --timeout"
            findings = [fail(f"did not end within {limit_s:g} s", hint)]
        except Exception as error:  # whatever a check meets is a finding
            findings = [fail(in_a_line(error), "see what it names")]
        yield from (NamedFinding(name, finding) for finding in findings)


def _all(check: Check, case: Case) -> list[Finding]:
    return list(check(case))


def check_cluster(case: Case) -> Iterator[Finding]:
    """Joins the cluster, if there is one, and has its machines look at themselves."""
    joined = False
    case.address = find_address(case.address)
    if case.address is None:
        yield ok("none runs here: a sweep starts its own, on this machine alone")
    else:
        try:
            within(case.limit_s, partial(join, case.address))
            joined = True
        except Exception as error:  # Ray's own errors are of many kinds
            mend = "start it, or name the right one with --address or RAY_ADDRESS"
            if "uthenticat" in str(error) or "token" in str(error):
                mend = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
            elif "ersion mismatch" in str(error):
                mend = "install the cluster's versions of Ray and Python here"
            yield fail(f"{case.address} cannot be joined: {in_a_line(error)}", mend)
    ask_machines(case, joined=joined)
    if joined:
        machines = [cluster.Node(m.cpus, m.gpus) for m in case.machines]
        yield ok(f"{case.address}: {cluster.describe_nodes(machines)}")
    for text in case.silent:
        yield fail(text, "install the same dtr_ray there, or restart Ray there (`ray stop`, `ray start`)")
    for machine in case.machines:
        for part, text in machine.answer.errors.items():
            yield fail(f"{machine.name}: {part}: {text}", f"see what {part} hangs on or lacks there")


def check_versions(case: Case) -> Iterator[Finding]:
    """All machines have the same Python, packages and code of ours."""
    facts = _facts(case, "software")
    if not facts:
        return
    same = []
    for key in ("python", *SHARED_PACKAGES, "dtr_ray", "code"):
        values = {_minor(f[key]) if key == "python" else f[key] for _, f in facts}
        what = {"code": "dtr_ray's code"}.get(key, key)
        if len(values) == 1:
            same.append(f"{what} {values.pop()}")
            continue
        found = "; ".join(f"{machine.name} {f[key]}" for machine, f in facts)
        yield fail(f"{what} differs: {found}", f"install the same {what} on all machines (constraints.txt)")
    on = f"on {len(facts)} machines" if len(facts) > 1 else "here"
    yield ok(f"{', '.join(same)} {on}")


def check_gpus(case: Case) -> Iterator[Finding]:
    """PyTorch can use the GPUs that are there, and a trial's workers can speak to one another over them."""
    resources = None if case.config is None else case.config.resources
    wanted = resources is not None and resources.gpus_per_worker > 0
    several = resources is not None and resources.workers_per_trial > 1
    kinds: dict[str, int] = {}
    for machine, found in _facts(case, "gpu"):
        level = fail if wanted or machine.gpus else warning
        count = int(found["count"])
        if not found["present"]:
            continue
        if not found.get("cuda"):
            yield level(
                f"{machine.name} has a GPU, but a PyTorch without CUDA", "install PyTorch's build for CUDA there"
            )
        elif found["fault"] or not count:
            version, why = found["driver"] or "unknown", found["fault"] or "PyTorch sees no GPU"
            yield level(
                f"{machine.name}: {why} (NVIDIA driver {version}, PyTorch for CUDA {found['cuda']})",
                f"install an NVIDIA driver that has CUDA {found['cuda']}, and give the container its GPUs",
            )
        elif found["unsupported"]:
            yield fail(
                f"{machine.name}: this PyTorch has no code for {', '.join(found['unsupported'])}",
                "install a build of PyTorch for these GPUs",
            )
        elif several and found["nccl"] is None:
            yield fail(f"{machine.name}: this PyTorch has no NCCL", "install PyTorch's build for CUDA and Linux")
        elif machine.gpus > count:
            yield fail(
                f"{machine.name}: Ray counts {machine.gpus:g} GPUs, PyTorch {count}",
                f"start Ray there with --num-gpus={count}",
            )
        else:
            text = f"{count} x {found['names'][0]} (driver {found['driver']}, CUDA {found['cuda']}"
            text += f", NCCL {found['nccl']})"
            kinds[text] = kinds.get(text, 0) + 1
    for text, count in kinds.items():
        yield ok(f"{count} machine{'s' * (count > 1)} with {text}")
    if not kinds and not wanted:
        yield ok("none, and none is asked for")


def check_storage(case: Case) -> Iterator[Finding]:
    """Each machine reads what the driver writes in the output folder, and the driver what it writes."""
    mend = "set storage.output to a folder that all machines share and can write, such as one on NFS"
    if case.storage_fault:
        yield fail(f"{case.output} cannot be written here: {case.storage_fault}", mend)
        return
    good = 0
    for machine, fault in _facts(case, "storage"):
        if fault:
            yield fail(f"{machine.name} {fault}", mend)
        elif not machine.written:
            yield fail(f"{case.output}: what {machine.name} writes there is not seen here", mend)
        else:
            good += 1
    if good:
        on = f"from {good} machines" if len(case.machines) > 1 else "from here"
        yield ok(f"{case.output} can be written and read {on}")


def check_disk(case: Case) -> Iterator[Finding]:
    """There is room for checkpoints, for the cache of data and weights, and for Ray's own files."""
    import shutil

    existing = next(path for path in (case.output, *case.output.parents) if path.exists())
    free, need = shutil.disk_usage(existing).free, _checkpoint_bytes(case)
    text = f"{size(free)} free for {case.output}"
    if need:
        text += f"; all checkpoints take {size(need)}"
    mend = "free space there, or choose another storage.output"
    yield fail(text, mend) if free < need else warning(text, mend) if free < 2 * need + _GB else ok(text)
    least = None
    for machine, found in _facts(case, "space"):
        for key, what in (("cache", "DTR_RAY_CACHE"), ("temp", "RAY_TMPDIR")):
            path, free, total = found[key]
            text = f"{machine.name}: {size(free)} of {size(total)} free for {path}"
            mend = f"free space there, or set {what} to a larger disk"
            if free < (1 - _FULLEST) * total and key == "temp" and free < 50 * _GB:
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
    for machine, found in _facts(case, "space"):
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
            yield warning(text, "give the container more (--shm-size): Ray's object store lies on disk otherwise")
        else:
            seen += 1
    if seen:
        yield ok(f"shared memory holds Ray's object store on {seen} machine{'s' * (seen > 1)}")


def check_open_files(case: Case) -> Iterator[Finding]:
    """A process may have enough files and connections open."""
    from resource import RLIMIT_NOFILE, getrlimit

    limits = {machine.name: limit for machine, limit in _facts(case, "open files")}
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
        text = f"{machine.name}: its clock is at least {off:.1f} s {'ahead of' if low > 0 else 'behind'} this one"
        mend = "run a time service there (chrony, or systemd-timesyncd)"
        if off > _CLOCK_WARNING_S:
            yield (fail if off > _CLOCK_FAIL_S else warning)(text, mend)
    if case.machines and worst <= _CLOCK_WARNING_S:
        alone = case.address is None or len(case.machines) == 1
        yield ok("one machine, one clock" if alone else f"clocks agree within {_CLOCK_WARNING_S:g} s")


def check_weights(case: Case) -> Iterator[Finding]:
    """The pretrained weights that the sweep names are there, or can be fetched."""
    if case.config is None:
        return
    here: dict[str, int] = {}
    for machine, found in _facts(case, "weights"):
        for name, state, text in found:
            if state == "missing":
                yield fail(f"{machine.name}: {text}", "put them where it says, or open the way to them")
            elif state == "later":
                yield ok(f"{machine.name}: {name} is not there yet, a sweep fetches it from {text}")
            else:
                here[name] = here.get(name, 0) + 1
    for name, count in here.items():
        yield ok(f"{name} on {count} machine{'s' * (count > 1)}")
    if not any(found for _, found in _facts(case, "weights")):
        yield ok("none is needed")


def check_images(case: Case) -> Iterator[Finding]:
    """Each machine that runs trials sees the data, as far as that is known without decoding it."""
    if case.config is None:
        return
    data, good = case.config.trial.data, 0
    for machine, fault in _facts(case, "data"):
        if fault:
            yield fail(f"{machine.name}: {fault}", "put the same data there, or mend the file's `data`")
        else:
            good += machine.runs_trials
    if good:
        from dtr_ray.evaluation.references import check_references

        check_references(data, case.config.trial.evaluation.features)
        yield ok(f"{data.path or data.name} on {good} machine{'s' * (good > 1)}")


def check_room(case: Case) -> Iterator[Finding]:
    """At least one whole trial fits the cluster."""
    machines = [cluster.Node(m.cpus, m.gpus) for m in case.machines]
    if case.config is None:
        return
    try:
        count = cluster.num_concurrent_trials(case.config.resources, machines)
    except cluster.TooSmallError as error:
        yield fail(str(error), "start more or larger machines, or lower `resources`")
        return
    what = cluster.describe(case.config.resources)
    yield ok(f"{count} trial{'s' * (count > 1)} of {what} at a time")


def _facts(case: Case, part: str) -> list[tuple[Machine, "Any"]]:
    return [(m, m.answer.facts[part]) for m in case.machines if part in m.answer.facts]


def _checkpoint_bytes(case: Case) -> float:
    from dtr_ray.service.plan import make_plan

    return 0.0 if case.config is None else make_plan(case.config, cluster.local_nodes()).storage_gb * _GB


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


CHECKS: dict[str, tuple[Check, float]] = {
    "python": (check_python, 1),
    "packages": (check_packages, 1),
    "ray": (check_cluster, 4),
    "versions": (check_versions, 1),
    "gpu": (check_gpus, 1),
    "storage": (check_storage, 1),
    "disk": (check_disk, 1),
    "memory": (check_object_store, 1),
    "files": (check_open_files, 1),
    "clock": (check_clock, 1),
    "room": (check_room, 1),
    "data": (check_images, 1),
    "weights": (check_weights, 1),
    "mlflow": (check_mlflow, 1),
    "study": (check_study, 1),
}
"""Every check by its name, in order, with its time limit in times of the case's; `ray` asks the machines, whose
answers those after it judge."""
