"""What all faults need: whom to hit, and whether it was hit."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from chaos.case import Case, Doing
from chaos.world import HEAD, WORKERS, Process
from tiny_sweeps import wait_until

GONE_S = 60.0
"""For what has to end."""


class MissedError(Exception):
    """The fault has hit nothing."""


def kill(pids: list[int], signum: int = signal.SIGKILL) -> None:
    """A signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def end(pids: list[int]) -> None:
    """SIGKILL, and waits until they are gone."""
    if not pids:
        raise MissedError("there was no such process")
    kill(pids)
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), GONE_S, "they are gone")


def titled(case: Case, *titles: str) -> list[tuple[str, Process]]:
    """Processes with one of the titles, with their machines."""
    return [
        (name, process)
        for name in (HEAD, *WORKERS)
        for title in titles
        for process in case.world.processes(name, title)
    ]


def at(doing: Doing) -> str:
    """What was hit, in words."""
    step = doing.attempt.to_step or 0
    return f"{doing.trial_id} {doing.phase} {step} on {doing.attempt.host}"
