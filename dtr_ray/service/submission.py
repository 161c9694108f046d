"""Sweeps as Ray jobs: submitted from any machine that reaches the cluster's job server, followed, stopped.

A job's id is the sweep's name and a number: `ffhq@2` is the second time that `ffhq` was submitted to this
cluster. The sweep itself is the same wherever it runs; the cluster forgets its jobs with its head, but what
the sweep keeps in `storage.output` stays, and `--resume` goes on from there.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus

from dtr_ray.config import SweepConfig
from dtr_ray.search.database import without_password
from dtr_ray.service.submission_client import Client, connect, follow, ray_versions
from dtr_ray.service.submission_files import job_environment, not_sent, pack

INTERRUPTED = 130
"""Exit code of a command that was interrupted, and of a sweep that was stopped: all is kept."""
_SWEEP, _RESUME = "dtr_ray.sweep", "dtr_ray.resume"
# A sweep that is asked to end says what it has done, and sends MLflow what it can.
_STOP_S = 60
_POLL_S = 0.5


@dataclass(frozen=True)
class Ways:
    """How a user comes back to a sweep."""

    program: str
    """`python -m dtr_ray.sweep`."""
    address: str | None
    """As it was given with --address."""

    def to(self, verb: str, name: str = "") -> str:
        """A command about a submitted sweep: `to("attach", "ffhq")`."""
        words = [f"--{verb}", *([name] if name else [])]
        words += ["--address", self.address] if self.address else []
        return f"{self.program} {shlex.join(words)}"


def submit(
    config: SweepConfig,
    options: Sequence[str],
    resume: Mapping[str, str],
    ways: Ways,
    *,
    detach: bool = False,
) -> int:
    """Sends a sweep to the cluster and follows it; returns its exit code.

    Args:
        config: the sweep, for which `check_shippable` has nothing to say.
        options: what the driver there is started with, besides its file.
        resume: the variable that tells the driver which command its user goes on with.
        ways: how to come back.
        detach: return as soon as the job is there.

    Raises:
        ValueError: the cluster does not answer, or runs a sweep of this name.
    """
    client = connect(ways.address)
    earlier = [job for job in _sweeps(client.list_jobs()) if _name(job) == config.name]
    for job in earlier:
        if not job.status.is_terminal():
            here = ways.to("attach", config.name)
            raise ValueError(f"{config.name} runs there already, as {_id(job)}; follow it with {here}")
    for sentence in (*not_sent(config, os.environ), *_versions(client)):
        print(f"warning: {sentence}", file=sys.stderr)
    job_id = f"{config.name}@{max(map(_number, earlier), default=0) + 1}"
    _send(client, job_id, config, options, resume)
    print(f"submitted as {job_id}; Ctrl-C leaves it running", flush=True)
    if detach:
        print(_come_back(config.name, ways))
        return 0
    return _follow(client, job_id, config.name, ways)


def attach(name: str, ways: Ways) -> int:
    """Follows a sweep again, by its name or its job's id; the exit code is the sweep's.

    Raises:
        ValueError: there is no such sweep; without a name, not exactly one runs.
    """
    client = connect(ways.address)
    job = _find(client, name, ways)
    return _follow(client, _id(job), _name(job), ways)


def stop(name: str, ways: Ways) -> int:
    """Ends a running sweep in good order, and says how to go on with it.

    Raises:
        ValueError: no such sweep runs.
    """
    client = connect(ways.address)
    job = _find(client, name, ways)
    if job.status.is_terminal():
        raise ValueError(f"{_id(job)} does not run any more: {_ending(job)}")
    client.stop_job(_id(job))
    print(f"stopping {_id(job)}", flush=True)
    end = time.monotonic() + _STOP_S + 30.0
    while not job.status.is_terminal():
        if time.monotonic() > end:
            print(f"error: {_id(job)} has not ended yet; look at it with\n  {ways.to('attach', _name(job))}")
            return 1
        time.sleep(_POLL_S)
        job = client.get_job_info(_id(job))
    rest = "" if job.status == JobStatus.SUCCEEDED else f"; everything is kept. To go on:\n  {_resume(job)}"
    print(f"{_id(job)} {_ending(job)}{rest}")
    return 0


def print_list(ways: Ways) -> int:
    """Prints the sweeps that were submitted to the cluster, each by its last job."""
    client = connect(ways.address)
    last = {_name(job): job for job in _sweeps(client.list_jobs())}
    if not last:
        print(f"no sweep has been submitted to {without_password(client.get_address())}")
    for name, job in last.items():
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
        print(f"{name:30}  {_id(job):34}  since {since}  {_ending(job)}")
    return 0


def _send(
    client: Client, job_id: str, config: SweepConfig, options: Sequence[str], resume: Mapping[str, str]
) -> None:
    """Packs, uploads and starts the job; its id belongs to whoever comes first."""
    resume = {name: without_password(command) for name, command in resume.items()}
    variables = {**job_environment(config, os.environ), **resume, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
    with tempfile.TemporaryDirectory(prefix="dtr-ray-") as folder:
        shipment = pack(config, Path(folder))
        size = f"{shipment.num_files} files, {shipment.num_bytes / 2**20:.1f} MiB"
        print(f"sending {size} to {without_password(client.get_address())}", flush=True)
        try:
            client.submit_job(
                entrypoint=shlex.join(["exec", "python", "-m", "dtr_ray.sweep", shipment.file, *options]),
                submission_id=job_id,
                runtime_env={"working_dir": str(shipment.folder), "env_vars": variables},
                metadata={_SWEEP: config.name, _RESUME: "".join(resume.values())},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise ValueError(f"{job_id} was submitted by somebody else just now: see --list") from error
            raise


def _versions(client: Client) -> Iterator[str]:
    here, there = ray_versions(client)
    if here != there:
        yield f"Ray is {here} here and {there} on the cluster"


def _follow(client: Client, job_id: str, name: str, ways: Ways) -> int:
    try:
        job = follow(client, job_id)
    except KeyboardInterrupt:
        print(f"\ndetached: {name} goes on. {_come_back(name, ways)}", file=sys.stderr)
        return INTERRUPTED
    if job is None:
        print(f"error: the cluster is out of sight; {name} may go on. {_come_back(name, ways)}")
        return 1
    if job.status == JobStatus.STOPPED:
        print(f"{job_id} was stopped; everything is kept. To go on:\n  {_resume(job)}", file=sys.stderr)
        return INTERRUPTED
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        why = (job.message or "").strip().split("\n")[0][:300]
        print(f"error: {job_id} ended: {why}; to go on:\n  {_resume(job)}", file=sys.stderr)
        return 1
    # Killed by a signal, it is a negative number.
    return max(1, code) if (code := job.driver_exit_code or 0) else 0


def _find(client: Client, name: str, ways: Ways) -> JobDetails:
    """The job of that id, or the last of that sweep; of no name, the only one that runs."""
    jobs = list(_sweeps(client.list_jobs()))
    running = [job for job in jobs if not job.status.is_terminal()]
    if not name and len(running) == 1:
        return running[0]
    if not name:
        names = ", ".join(_name(job) for job in running)
        which = (
            f"several sweeps run there: {names}; give the name of one" if running else "no sweep runs there"
        )
        raise ValueError(f"{which} ({ways.to('list')} shows all)")
    exact = [job for job in jobs if name in (_id(job), job.job_id)]
    found = exact or [job for job in jobs if _name(job) == name]
    if not found:
        raise ValueError(
            f"no sweep {name!r:.100} has been submitted to this cluster ({ways.to('list')}); a cluster whose "
            "head was restarted has forgotten those before: submit it again with --resume"
        )
    return found[-1]


def _sweeps(jobs: Iterable[JobDetails]) -> list[JobDetails]:
    """The jobs that are submitted sweeps, in order of submission."""
    found = [job for job in jobs if job.submission_id and _SWEEP in (job.metadata or {})]
    return sorted(found, key=lambda job: (job.start_time or 0, _number(job)))


def _id(job: JobDetails) -> str:
    return str(job.submission_id)


def _name(job: JobDetails) -> str:
    return str((job.metadata or {})[_SWEEP])


def _number(job: JobDetails) -> int:
    number = _id(job).rpartition("@")[2]
    return int(number) if number.isdecimal() else 0


def _resume(job: JobDetails) -> str:
    return str((job.metadata or {}).get(_RESUME, ""))


def _ending(job: JobDetails) -> str:
    """What a job does or how it ended, in a word or two."""
    if job.status == JobStatus.FAILED and job.driver_exit_code is not None:
        code = job.driver_exit_code
        return "stopped" if code == INTERRUPTED else f"failed with code {code}"
    words = {
        JobStatus.PENDING: "starts",
        JobStatus.RUNNING: "runs",
        JobStatus.STOPPED: "stopped",
        JobStatus.SUCCEEDED: "completed",
        JobStatus.FAILED: "died",
    }
    return words[job.status]


def _come_back(name: str, ways: Ways) -> str:
    return f"To come back, and to stop it:\n  {ways.to('attach', name)}\n  {ways.to('stop', name)}"
