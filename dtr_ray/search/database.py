"""The database of the Optuna study: its address and driver, and one line where it does not answer.

An address needs no password: PostgreSQL drivers take it from PGPASSWORD or ~/.pgpass, and any database's may
be in DTR_RAY_STUDY_PASSWORD. One that has a password is shown and kept without it.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from dtr_ray.config import SweepConfig

PASSWORD = "DTR_RAY_STUDY_PASSWORD"  # noqa: S105, the name of a variable
_FORM = "write it as postgresql://USER@HOST:PORT/DATABASE, mysql://... or sqlite:///FILE"
_CONNECT_TIMEOUT_S = 10
# Drivers by database, the preferred first: SQLAlchemy's name, and the module that it needs.
_DRIVERS = {
    "postgresql": {"psycopg2": "psycopg2", "psycopg": "psycopg", "pg8000": "pg8000"},
    "mysql": {"mysqldb": "MySQLdb", "pymysql": "pymysql", "mysqlconnector": "mysql.connector"},
}
_EXTRAS = {"postgresql": "pip install 'dtr_ray[postgresql]'", "mysql": "pip install pymysql"}
# A server whose machine has vanished is noticed within a minute, not after the kernel's quarter of an hour.
_KEEP_ALIVE = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 45_000,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "psycopg2": {"connect_timeout": _CONNECT_TIMEOUT_S, **_KEEP_ALIVE},
    "psycopg": {"connect_timeout": _CONNECT_TIMEOUT_S, **_KEEP_ALIVE},
    "pg8000": {"timeout": _CONNECT_TIMEOUT_S},
    "mysqldb": {"connect_timeout": _CONNECT_TIMEOUT_S},
    "pymysql": {"connect_timeout": _CONNECT_TIMEOUT_S},
    "mysqlconnector": {"connection_timeout": _CONNECT_TIMEOUT_S},
}


def database_url(address: str) -> URL:
    """An address with the driver that is installed, and with the password of the environment.

    SQLAlchemy's own choice for `postgresql://` differs by its version, and may not be installed.

    Raises:
        ValueError: it is no address, or there is no driver for it.
    """
    try:
        url = make_url(address.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError):
        # SQLAlchemy's message may hold the whole address.
        raise ValueError(f"{without_password(address)} is no database's address: {_FORM}") from None
    if "@" in (url.host or ""):
        raise ValueError(f"{without_password(address)}: write an @ in its password as %40, a / as %2F")
    backend, _, named = url.drivername.partition("+")
    if backend in _DRIVERS and not named:
        driver = next((name for name, module in _DRIVERS[backend].items() if _is_installed(module)), None)
        if driver is None:
            names = ", ".join(_DRIVERS[backend])
            raise ValueError(
                f"{without_password(address)} needs a driver (one of {names}), and none is installed: "
                f"{_EXTRAS[backend]}"
            )
        url = url.set(drivername=f"{backend}+{driver}")
    if url.password is None and url.host and os.environ.get(PASSWORD):
        url = url.set(password=os.environ[PASSWORD])
    return url


def engine_options(url: URL) -> dict[str, Any]:
    """What an engine of that database is made with: connections are tried before they are used."""
    if url.get_backend_name() == "sqlite":
        return {}
    driver = url.drivername.partition("+")[2]
    given = {key: value for key, value in _OPTIONS.get(driver, {}).items() if key not in url.query}
    return {"pool_pre_ping": True, "connect_args": given}


def check_database(address: str) -> None:
    """Asks the database a question.

    Raises ValueError, in one line and without the password, where it gives no answer.
    """
    url = database_url(address)
    try:
        engine = create_engine(url, **engine_options(url))
        with engine.connect() as connection:
            connection.execute(text("select 1"))
        engine.dispose()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise ValueError(f"{without_password(address)} does not answer: {reason_of(error, url)}") from None


def reason_of(error: BaseException, url: URL | None = None) -> str:
    """Why a database failed, as its driver says it, in one line and without the address's password."""
    found: BaseException | None = error
    while found is not None:
        error = getattr(found, "orig", None) or found
        found = found.__cause__
    reason = " ".join(without_password(str(error)).split())
    password = None if url is None or url.password is None else str(url.password)
    if password:
        reason = re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", "***", reason)
    return reason[:300] or type(error).__name__


def without_password(text: str) -> str:
    """A text whose addresses have lost their passwords: the user's name stays."""
    text = re.sub(r"(//[^:@/\s]*|^\w+):(?!//)\S*@", r"\1@", text)
    return re.sub(r"([?&](?:password|sslpassword)=)[^&\s]*", r"\1***", text)


def public(config: SweepConfig) -> dict[str, Any]:
    """The sweep's configuration as it is kept and logged: no address holds a password."""
    values = config.to_dict()
    for section, key in (("storage", "study"), ("tracking", "uri")):
        if values[section][key] is not None:
            values[section][key] = without_password(values[section][key])
    return values


def study_url(config: SweepConfig, folder: Path) -> str:
    """The Optuna storage: the configured database, or SQLite in the sweep's folder."""
    return config.storage.study or f"sqlite:///{(folder / 'study.db').resolve()}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package that it is a part of.
        return False
