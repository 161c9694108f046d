"""Faults of servers: MLflow's, and its database, which has the study too."""

import signal
import time

from chaos.case import Case, Doing
from chaos.hitting import MissedError, at
from chaos.world import SERVER

AWAY = ("takes no records now", "its database is away")
"""What a sweep says when a server does not answer."""


def _aim(case: Case, phase: str) -> Doing:
    """As the case's own, once the sweep has got over an outage before."""
    until = time.monotonic() + 60
    while time.monotonic() < until and case.driver.code is None:
        output = case.driver.output
        if output.rfind("takes no records now") <= output.rfind("takes records again"):
            break
        time.sleep(0.5)
    return case.aim(phase)


def _told(case: Case) -> int:
    return sum(case.driver.output.count(words) for words in AWAY)


def _wait_told(case: Case, before: int, seconds: float = 40) -> None:
    """Until the driver has noticed."""
    until = time.monotonic() + seconds
    while _told(case) == before:
        if time.monotonic() > until or case.driver.code is not None:
            raise MissedError("the driver has not noticed")
        time.sleep(0.2)


def kill_tracking(case: Case, phase: str) -> str:
    doing, before = _aim(case, phase), _told(case)
    case.world.tracking.kill()
    try:
        _wait_told(case, before)
        time.sleep(case.rng.uniform(0, 8))
    finally:
        case.world.tracking.start()
    return at(doing)


def hang_tracking(case: Case, phase: str) -> str:
    doing, before = _aim(case, phase), _told(case)
    case.world.tracking.signal(signal.SIGSTOP)
    try:
        _wait_told(case, before)
    finally:
        case.world.tracking.signal(signal.SIGCONT)
    return at(doing)


def restart_tracking(case: Case, phase: str) -> str:
    """In good order, by an administrator."""
    doing, before = _aim(case, phase), _told(case)
    case.world.tracking.stop()
    case.world.tracking.start()
    _wait_told(case, before, 5)
    return at(doing)


def kill_database(case: Case, phase: str) -> str:
    doing, before = _aim(case, phase), _told(case)
    case.world.postgres.kill()
    try:
        _wait_told(case, before)
        time.sleep(case.rng.uniform(0, 5))
    finally:
        case.world.postgres.start()
    return at(doing)


def refuse_connections(case: Case, phase: str) -> str:
    """The database runs, but lets nobody in."""
    doing, before, postgres = _aim(case, phase), _told(case), case.world.postgres
    names = "'mlflow', 'optuna'"
    for name in ("mlflow", "optuna"):
        postgres.query(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", "postgres")
    sql = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ({names})"
    postgres.query(sql, "postgres")
    try:
        _wait_told(case, before)
        time.sleep(case.rng.uniform(0, 5))
    finally:
        for name in ("mlflow", "optuna"):
            postgres.query(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true", "postgres")
    return at(doing)


def cut_servers(case: Case, phase: str) -> str:
    """Packets to MLflow and the database vanish."""
    doing, before = _aim(case, phase), _told(case)
    case.world.cut(SERVER)
    try:
        _wait_told(case, before, 90)
    finally:
        case.world.mend(SERVER)
    return at(doing)
