"""The doctor: looks at everything that a sweep stands on, and says what is wrong and how to mend it.

It starts no Ray and fetches nothing. Each check is a function from the case to findings, has a time limit,
and says so where it runs into it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from dtr_ray.service import cluster
from dtr_ray.service.cluster_answers import Case, ask_machines, find_address, join
from dtr_ray.service.findings import Finding, fail, in_a_line, ok, warning, within
from dtr_ray.service.installation import check_packages, check_python
from dtr_ray.service.machine_checks import (
    check_clock,
    check_disk,
    check_gpus,
    check_object_store,
    check_open_files,
)
from dtr_ray.service.node_checks import SHARED_PACKAGES
from dtr_ray.service.servers import check_mlflow, check_study

Check = Callable[[Case], Iterable[Finding]]


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
        yield ok("no cluster: a sweep starts its own Ray, on this machine alone")
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
    facts = case.facts("software")
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


def check_storage(case: Case) -> Iterator[Finding]:
    """Each machine reads what the driver writes in the output folder, and the driver what it writes."""
    mend = "set storage.output to a folder that all machines share and can write, such as one on NFS"
    if case.store is not None:
        mend = "give each machine the keys or the role of the store (docs/storage.md)"
    if case.storage_fault:
        yield fail(f"{case.place} cannot be written here: {case.storage_fault}", mend)
        return
    good = 0
    for machine, fault in case.facts("storage"):
        if fault:
            yield fail(f"{machine.name} {fault}", mend)
        elif not machine.written:
            yield fail(f"{case.place}: what {machine.name} writes there is not seen here", mend)
        else:
            good += 1
    if good:
        on = f"from {good} machines" if len(case.machines) > 1 else "from here"
        yield ok(f"{case.place} can be written and read {on}")


def check_weights(case: Case) -> Iterator[Finding]:
    """The pretrained weights that the sweep names are there, or can be fetched."""
    if case.config is None or not any(machine.runs_trials for machine in case.machines):
        return
    here: dict[str, int] = {}
    for machine, found in case.facts("weights"):
        for name, state, text in found:
            if state == "missing":
                yield fail(f"{machine.name}: {text}", "put them where it says, or open the way to them")
            elif state == "later":
                yield ok(f"{machine.name}: {name} is not there yet, a sweep fetches it from {text}")
            else:
                here[name] = here.get(name, 0) + 1
    for name, count in here.items():
        yield ok(f"{name} on {count} machine{'s' * (count > 1)}")
    if not any(found for _, found in case.facts("weights")):
        yield ok("none is needed")


def check_images(case: Case) -> Iterator[Finding]:
    """Each machine that runs trials sees the data, as far as that is known without decoding it."""
    if case.config is None:
        return
    data, good = case.config.trial.data, 0
    if not any(machine.runs_trials for machine in case.machines):
        text = "no machine that runs trials is up yet: data and weights are not looked at"
        yield warning(text, "run this again once a sweep has brought one up")
    for machine, fault in case.facts("data"):
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
"""Every check by its name, in order, with its time limit in times of the case's; `ray` asks the machines,
whose answers those after it judge."""
