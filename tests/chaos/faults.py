"""What may happen to a sweep, all in one dict.

A fault waits for its moment, strikes, and sees to it that it has taken effect; then it does what an init
system would do. It returns what it has hit. One that has hit nothing raises MissedError, and is not counted.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass

from chaos import disks, machines, outages, processes
from chaos.case import Case


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    strike: Callable[[Case, str], str]
    """Called with the sweep and the phase to aim at; returns what was hit."""
    needs: frozenset[str] = frozenset()
    """What the sweep must have: `servers`, `workers`."""
    ends_driver: bool = False
    """Whether the sweep's own process ends with it, so that --resume is typed."""


_SERVERS, _WORKERS, _ELASTIC = frozenset({"servers"}), frozenset({"workers"}), frozenset({"elastic"})
FAULTS: dict[str, Fault] = {
    "training process SIGKILL": Fault(processes.kill_main_process),
    "second worker SIGKILL": Fault(processes.kill_other_worker, _WORKERS),
    "trial's Tune actor SIGKILL": Fault(processes.kill_trial_actor, _WORKERS),
    "trial hangs (SIGSTOP)": Fault(processes.hang),
    "trial out of memory (kernel)": Fault(processes.run_out_of_memory),
    "node: raylet SIGKILL": Fault(machines.kill_raylet),
    "node: machine off and on": Fault(machines.switch_machine_off),
    "node: preemption notice": Fault(machines.take_machine_away),
    "node: gone (elastic shrink)": Fault(machines.shrink, _ELASTIC),
    "clock of a machine jumps": Fault(machines.set_clock),
    "head: Ray and sweep SIGKILL": Fault(machines.kill_head, ends_driver=True),
    "head: machine off and on": Fault(machines.switch_head_off, ends_driver=True),
    "sweep SIGKILL": Fault(processes.signal_driver(signal.SIGKILL, -9), ends_driver=True),
    "sweep's group SIGKILL": Fault(processes.signal_driver(signal.SIGKILL, -9, group=True), ends_driver=True),
    "sweep Ctrl-C": Fault(processes.signal_driver(signal.SIGINT, 130), ends_driver=True),
    "sweep SIGTERM": Fault(processes.signal_driver(signal.SIGTERM, 130), ends_driver=True),
    "MLflow SIGKILL and down": Fault(outages.kill_tracking, _SERVERS),
    "MLflow hangs (SIGSTOP)": Fault(outages.hang_tracking, _SERVERS),
    "MLflow restarted": Fault(outages.restart_tracking, _SERVERS),
    "PostgreSQL SIGKILL and down": Fault(outages.kill_database, _SERVERS),
    "PostgreSQL refuses": Fault(outages.refuse_connections, _SERVERS),
    "node cut off for seconds": Fault(machines.cut_for_a_moment),
    "node cut off and given up": Fault(machines.cut_for_long),
    "head cut off from all": Fault(machines.cut_head_for_long),
    "servers cut off": Fault(outages.cut_servers, _SERVERS),
    "results' disk full": Fault(disks.fill_results),
    "/tmp full": Fault(disks.fill_temporary),
    "Ray's object store full": Fault(disks.fill_object_store),
    "power off: unsynced lost": Fault(disks.lose_unsynced, ends_driver=True),
    "checkpoint truncated": Fault(disks.damaged(disks.truncate)),
    "checkpoint's bit flipped": Fault(disks.damaged(disks.flip_bit)),
    "checkpoint's file removed": Fault(disks.damaged(disks.remove_file)),
}
"""All kinds of faults by the name that the table shows."""
