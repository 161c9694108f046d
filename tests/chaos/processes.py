"""Faults of processes: of trials, and of the sweep itself."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos.case import Case
from chaos.hitting import GONE_S, MissedError, at, end, kill, titled
from control_groups import can_limit, little_memory
from tiny_sweeps import wait_until


def kill_main_process(case: Case, phase: str) -> str:
    """The process that trains: Tune's actor, or the main worker of Ray Train."""
    doing = case.aim(phase)
    end([doing.pid])
    return at(doing)


def kill_other_worker(case: Case, phase: str) -> str:
    """A worker of a Ray Train trial that is not its main one."""
    doing = case.aim(phase)
    others = [p.pid for _, p in titled(case, "ray::RayTrainWorker") if p.pid != doing.pid]
    end([case.rng.choice(others)] if others else [])
    return at(doing)


def kill_trial_actor(case: Case, phase: str) -> str:
    """Tune's actor, which hands a Ray Train trial's reports on."""
    doing = case.aim(phase)
    end([p.pid for _, p in titled(case, "ray::ResourceTrainable")][:1])
    return at(doing)


def hang(case: Case, phase: str) -> str:
    """A process that stands still; the watchdog has to end it."""
    doing = case.aim("training")
    kill([doing.pid], signal.SIGSTOP)
    try:
        wait_until(lambda: not Path(f"/proc/{doing.pid}/exe").exists(), 200, "what hangs is ended")
    finally:
        kill([doing.pid], signal.SIGCONT)
    return at(doing)


def run_out_of_memory(case: Case, phase: str) -> str:
    """The kernel ends a process that may have no more memory."""
    if not can_limit():
        raise MissedError("there is no memory control group to write to")
    doing = case.aim(phase)
    with little_memory(2**20) as group:
        (group / "cgroup.procs").write_text(str(doing.pid))
        until = time.monotonic() + GONE_S
        while Path(f"/proc/{doing.pid}/exe").exists() and time.monotonic() < until:
            time.sleep(0.1)
        killed = "oom_kill 0" not in (group / "memory.oom_control").read_text()
    if not killed:
        raise MissedError("it had memory enough")
    return at(doing)


def signal_driver(signum: int, code: int, *, group: bool = False) -> Callable[[Case, str], str]:
    """A signal to the sweep, which ends with that code; or to all processes of its group."""

    def strike(case: Case, phase: str) -> str:
        doing = case.aim(phase)
        if group:
            os.killpg(case.driver.process.pid, signum)
        else:
            kill([case.driver.pid], signum)
        found = case.driver.wait(GONE_S)
        if found == 0:
            raise MissedError("it had just ended")
        if found != code:
            case.troubles.append(f"the driver's code is {found}, not {code}: {case.driver.output[-1500:]}")
        return at(doing)

    return strike
