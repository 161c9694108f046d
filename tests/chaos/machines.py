"""Faults of machines: of what runs there, their power, their clocks and their network."""

import time
from pathlib import Path

from chaos.case import Case
from chaos.hitting import GONE_S, MissedError, at, end, titled
from chaos.world import HEAD, RAY, WORKERS
from tiny_sweeps import records, wait_until

_DAY_S = 86400


def kill_raylet(case: Case, phase: str) -> str:
    doing = case.aim(phase)
    end([p.pid for p in case.world.processes(doing.attempt.host, "raylet/raylet")])
    case.world.wait_joined()
    return at(doing)


def switch_machine_off(case: Case, phase: str) -> str:
    doing = case.aim(phase)
    if doing.attempt.host == HEAD:
        raise MissedError("it is the head")
    case.world.power_off(doing.attempt.host)
    time.sleep(case.rng.uniform(0, 5))
    case.world.power_on(doing.attempt.host)
    case.world.wait_joined()
    return at(doing)


def take_machine_away(case: Case, phase: str) -> str:
    """As a cloud does with a spot machine: a notice, then it is gone; another one comes."""
    doing = case.aim(phase)
    host = doing.attempt.host
    node = case.world.alive().get(host)
    if host == HEAD or node is None:
        raise MissedError("it is no machine that goes")
    reason = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 30"
    case.world.ray(f"drain-node --address {RAY} --node-id {node} {reason}")
    left = False
    until = time.monotonic() + 30
    while not left and time.monotonic() < until and case.driver.code is None:
        left = records(case.folder)[doing.trial_id].moves > 0
        time.sleep(0.2)
    case.world.power_off(host)
    case.world.power_on(host)
    case.world.wait_joined()
    return at(doing) + (", left before" if left else "")


def shrink(case: Case, phase: str) -> str:
    """A machine is gone for so long that its trial goes on with fewer workers."""
    doing = case.aim(phase)
    host = case.rng.choice(WORKERS)
    case.world.power_off(host)

    def goes_on() -> bool:
        later = case.attempts().get(doing.trial_id, [])[doing.attempt.attempt :]
        return any(attempt.num_steps for attempt in later) or case.driver.code is not None

    try:
        wait_until(goes_on, 300, f"{doing.trial_id} goes on with the workers that are left")
    finally:
        case.world.power_on(host)
    case.world.wait_joined()
    return at(doing)


def set_clock(case: Case, phase: str) -> str:
    """The clock of the head or of a worker is hours or days off, for some seconds."""
    doing = case.aim(phase)
    if case.world.power is None:
        raise MissedError("it needs gcc")
    host = case.rng.choice([HEAD, doing.attempt.host])
    shift = case.rng.choice([3600, 3 * _DAY_S, -5 * _DAY_S])
    case.world.set_clock(host, shift)
    time.sleep(case.rng.uniform(3, 8))
    seen = int(case.world.lan.machines[host].run(f"env {case.world.settings(host)} date +%s"))
    case.world.set_clock(host, 0)
    if abs(seen - time.time() - shift) > 60:
        raise MissedError(f"its clock says {seen}")
    return f"{at(doing)}, {host}'s clock {shift:+d} s"


def kill_head(case: Case, phase: str) -> str:
    """Ray's processes on the head and the sweep's own."""
    doing = case.aim(phase)
    found = [p.pid for name, p in titled(case, "gcs/gcs_server", "raylet/raylet") if name == HEAD]
    end([*found, case.driver.pid])
    case.driver.wait(GONE_S)
    return at(doing)


def switch_head_off(case: Case, phase: str) -> str:
    doing = case.aim(phase)
    case.world.power_off(HEAD)
    case.driver.wait(GONE_S)
    time.sleep(case.rng.uniform(0, 5))
    case.world.power_on(HEAD)
    return at(doing)


def _retransmitted(case: Case, name: str) -> int:
    """Packets that the machine has had to send again."""
    lines = Path(f"/proc/{case.world.lan.machines[name].pid}/net/snmp").read_text().splitlines()
    names, values = [line.split() for line in lines if line.startswith("Tcp:")]
    return int(values[names.index("RetransSegs")])


def cut_for_a_moment(case: Case, phase: str) -> str:
    """Seconds in which packets are lost, of a machine that trains; Ray's patience is longer."""
    doing = case.aim(phase)
    host = doing.attempt.host
    before = _retransmitted(case, host)
    case.world.cut(host)
    time.sleep(case.rng.uniform(2, 5))
    case.world.mend(host)
    if _retransmitted(case, host) == before:
        raise MissedError("no packet was lost")
    return at(doing)


def cut_for_long(case: Case, phase: str) -> str:
    """Until Ray has given the machine up."""
    doing = case.aim(phase)
    host = doing.attempt.host
    if host == HEAD:
        raise MissedError("it is the head")
    case.world.cut(host)
    try:
        wait_until(lambda: host not in case.world.alive(), GONE_S, f"Ray gives {host} up", poll_s=0.1)
        time.sleep(case.rng.uniform(0, 10))
    finally:
        case.world.mend(host)
    case.world.wait_joined()
    return at(doing)


def cut_head_for_long(case: Case, phase: str) -> str:
    """Until all other machines have given the head up; it runs on by itself."""
    doing = case.aim(phase)
    case.world.cut(HEAD)
    try:
        wait_until(lambda: not set(WORKERS) & set(case.world.alive()), GONE_S, "Ray gives all up", poll_s=0.1)
        time.sleep(case.rng.uniform(0, 5))
    finally:
        case.world.mend(HEAD)
    case.world.wait_joined()
    return at(doing)
