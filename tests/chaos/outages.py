"""Faults of servers: MLflow's, and its database, which has the study too."""

import signal
import time
from collections.abc import Callable

from chaos.case import Case, Doing
from chaos.hitting import MissedError, at
from chaos.world import SERVER, World

AWAY = ("takes no records now", "its database is away")
"""What a sweep says when a server does not answer."""
_DATABASES = ("mlflow", "optuna")


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


def _wait_told(case: Case, before: int, seconds: float) -> None:
    """Until the driver has noticed."""
    until = time.monotonic() + seconds
    while _told(case) == before:
        if time.monotonic() > until or case.driver.code is not None:
            raise MissedError("the driver has not noticed")
        time.sleep(0.2)


def _outage(
    begin: Callable[[World], None],
    end: Callable[[World], None],
    linger_s: float = 0.0,
    notice_s: float = 40.0,
) -> Callable[[Case, str], str]:
    """A fault that begins, and ends once the driver has noticed it, or up to `linger_s` later."""

    def strike(case: Case, phase: str) -> str:
        doing, before = _aim(case, phase), _told(case)
        begin(case.world)
        try:
            _wait_told(case, before, notice_s)
            if linger_s:
                time.sleep(case.rng.uniform(0, linger_s))
        finally:
            end(case.world)
        return at(doing)

    return strike


def restart_tracking(case: Case, phase: str) -> str:
    """In good order, by an administrator."""
    doing, before = _aim(case, phase), _told(case)
    case.world.tracking.stop()
    case.world.tracking.start()
    _wait_told(case, before, 5)
    return at(doing)


def _refuse(world: World) -> None:
    """The database runs, but lets nobody in."""
    _allow_connections(world, "false")
    names = ", ".join(f"'{name}'" for name in _DATABASES)
    sql = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ({names})"
    world.postgres.query(sql, "postgres")


def _allow_connections(world: World, allowed: str = "true") -> None:
    for name in _DATABASES:
        world.postgres.query(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}", "postgres")


kill_tracking = _outage(lambda world: world.tracking.kill(), lambda world: world.tracking.start(), 8)
hang_tracking = _outage(
    lambda world: world.tracking.signal(signal.SIGSTOP), lambda world: world.tracking.signal(signal.SIGCONT)
)
kill_database = _outage(lambda world: world.postgres.kill(), lambda world: world.postgres.start(), 5)
refuse_connections = _outage(_refuse, _allow_connections, 5)
cut_servers = _outage(lambda world: world.cut(SERVER), lambda world: world.mend(SERVER), notice_s=90)
"""Packets to MLflow and the database vanish."""
