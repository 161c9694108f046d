"""Faults of disks: full, without power, or with damaged checkpoints."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.case import Case, Doing, text_of
from chaos.hitting import GONE_S, MissedError, at, end, kill
from chaos.world import HEAD, WORKERS
from cluster.machines import Machine
from small_disks import fill
from tiny_sweeps import wait_until

TEMPORARY_MB = 4000
"""Of /tmp on a machine."""


def fill_results(case: Case, phase: str) -> str:
    """No byte is left where results go, for some seconds."""
    doing = case.aim(phase)
    ballast = fill(case.world.runs.parent)
    try:
        time.sleep(case.rng.uniform(5, 12))
        waits = any("waiting for disk" in text_of(p) for p in case.folder.glob("trials/*/progress.json"))
        refused = shutil.disk_usage(case.world.runs).free == 0
    finally:
        ballast.unlink()
    if not refused:
        raise MissedError("there was room")
    return at(doing) + (", waited" if waits else "")


def fill_temporary(case: Case, phase: str) -> str:
    """/tmp of a machine is full for some seconds: Ray's own logs and sockets are there."""
    doing = case.aim(phase)
    with _no_room(case.world.lan.machines[doing.attempt.host]):
        time.sleep(case.rng.uniform(5, 12))
    return at(doing)


def fill_object_store(case: Case, phase: str) -> str:
    """Ray's object store on a machine is full of what is in use, and so is the disk that it spills to."""
    doing = case.aim(phase)
    host = doing.attempt.host
    machine = case.world.lan.machines[host]
    hoard = f"env {case.world.settings(host)} python -c {shlex.quote(_HOARD)}"
    with subprocess.Popen(
        machine.command(hoard),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise MissedError("Ray takes no other program there")
            with _no_room(machine):
                print("go", file=process.stdin, flush=True)
                held = process.stdout.readline().strip()
                time.sleep(case.rng.uniform(5, 12))
        finally:
            # Its process in the machine ends with its input.
            process.stdin.close()
    if not held:
        raise MissedError("it was not filled")
    return f"{at(doing)}, {held}"


_HOARD = """
import sys, numpy, ray
ray.init(address="auto", log_to_driver=False)
print("ready", flush=True)
sys.stdin.readline()
held = []
try:
    while True:
        held.append(ray.get(ray.put(numpy.ones(1 << 20, numpy.uint8))))
except Exception as error:
    print(len(held), "MB,", type(error).__name__, flush=True)
sys.stdin.read()
"""


@contextmanager
def _no_room(machine: Machine) -> Iterator[None]:
    """The machine's /tmp is as small as what is on it."""
    used = "$(($(df --output=used -k /tmp | tail -1) + 16))"
    machine.run(f"until mount -o remount,size={used}k /tmp; do sleep 0.1; done", timeout=10)
    try:
        free = int(machine.run("df --output=avail -k /tmp | tail -1"))
        yield
    finally:
        machine.run(f"mount -o remount,size={TEMPORARY_MB}m /tmp")
    if free > 64:
        raise MissedError(f"there was room of {free} KiB")


def lose_unsynced(case: Case, phase: str) -> str:
    """All machines lose power, and the disk what was not synced, in the worst way or in any other."""
    power = case.world.power
    if power is None:
        raise MissedError("it needs gcc")
    doing = case.aim(phase)
    for name in (HEAD, *WORKERS):
        case.world.power_off(name)
    case.driver.wait(GONE_S)
    made = {trial_id: [a.to_step or 0 for a in found] for trial_id, found in case.attempts().items()}
    case.reached = {trial_id: max(steps, default=0) for trial_id, steps in made.items()}
    lost = power.cut(case.rng, worst=case.rng.random() < 0.5)
    case.count()
    for name in (HEAD, *WORKERS):
        case.world.power_on(name)
    return f"{at(doing)}, {len(lost.names)} names and {len(lost.contents)} files lost"


def damaged(damage: Callable[[Path, random.Random], None]) -> Callable[[Case, str], str]:
    """Damages a trial's newest checkpoint, and ends its process, so that it is read."""

    def strike(case: Case, phase: str) -> str:
        until = time.monotonic() + GONE_S
        while time.monotonic() < until:
            doing = case.aim("training")
            folder = case.folder / "trials" / doing.trial_id
            found = sorted((folder / "checkpoints").glob("[0-9]*"))
            # One that is not about to be followed by the next.
            if not found or (doing.attempt.to_step or 0) - int(found[-1].name) not in range(3, 16):
                time.sleep(0.005)
                continue
            kill([doing.pid], signal.SIGSTOP)
            newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
            damage(newest, case.rng)
            end([doing.pid])
            _check_read(case, doing, int(newest.name))
            return f"{at(doing)}, checkpoint {int(newest.name)}"
        raise MissedError("no checkpoint to damage")

    return strike


def _check_read(case: Case, doing: Doing, damaged: int) -> None:
    """The next process of the trial has begun before the damaged checkpoint: it has seen what that is."""

    def begun() -> bool:
        later = case.attempts().get(doing.trial_id, [])[doing.attempt.attempt :]
        steps = [a.from_step for a in later if a.from_step is not None]
        if steps and steps[0] >= damaged:
            raise MissedError("the checkpoint was not read")
        return bool(steps) or case.driver.code is not None

    wait_until(begun, 240, "the trial goes on after its damaged checkpoint", poll_s=0.1)


def truncate(checkpoint: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(p for p in checkpoint.iterdir() if p.stat().st_size))
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bit(checkpoint: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(checkpoint.iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove_file(checkpoint: Path, rng: random.Random) -> None:
    rng.choice(sorted(checkpoint.iterdir())).unlink()
