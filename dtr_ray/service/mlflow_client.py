"""Clients of MLflow: quiet, quick to fail, and on a SQLite file that is never half made."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from dtr_ray.disk import sync
from dtr_ray.search.database import check_database, database_url, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https")


def check_uri(uri: str) -> None:
    """Raises ValueError where an address is none that MLflow keeps records at; asks nobody."""
    shown = f"MLflow's address {without_password(uri)!r} (tracking.uri, MLFLOW_TRACKING_URI)"
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown} is no address: {error}") from error
    scheme = parts.scheme.partition("+")[0]
    if scheme not in (*_DATABASES, *_SERVERS, "databricks") and uri != "databricks":
        raise ValueError(
            f"{shown} is nowhere that MLflow keeps records: give sqlite:///FILE, a server (http://HOST:PORT)"
            " or a database (postgresql://HOST/NAME)"
        )
    if scheme in _SERVERS and (not host or re.search(r"\s", uri)):
        raise ValueError(f"{shown} is no address of a server: give http://HOST:PORT")


@contextmanager
def answering(uri: str, asked: str) -> Iterator[None]:
    """Tells what MLflow raises within as a ValueError that names its address, without a password.

    `asked` is what was asked for. For commands that cannot do without an answer; a sweep's tracker tries
    again instead.
    """
    check_uri(uri)
    try:
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ValueError(f"MLflow cannot be loaded ({error}): pip install dtr_ray") from error
    from sqlalchemy.exc import SQLAlchemyError

    if urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql"):
        # MLflow itself would ask a database that is not there for an hour.
        try:
            check_database(uri)
        except ValueError as error:
            where = "MLflow's database (tracking.uri, MLFLOW_TRACKING_URI)"
            raise ValueError(f"{asked}: {where}: {error}") from None
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = " ".join(without_password(str(error)).split())[:400]
        shown = without_password(uri)
        where = f"{asked}: MLflow at {shown} (tracking.uri, MLFLOW_TRACKING_URI)"
        raise ValueError(f"{where} says: {reason}") from error


def connect(tracking_uri: str) -> "MlflowClient":
    """A client that fails soon rather than retrying for minutes; the caller decides when to try again.

    It sets MLFLOW_HTTP_REQUEST_TIMEOUT (20 s), MLFLOW_HTTP_REQUEST_MAX_RETRIES (0) and
    MLFLOW_DISABLE_TELEMETRY for this process where they are unset, and mutes what MLflow prints, and its log
    unless MLFLOW_LOGGING_LEVEL is set. Importing MLflow takes seconds.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The address of every run that ends, password and all, into the midst of a live table.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.ERROR)
    path = sqlite_path(tracking_uri)
    if path is not None:
        _make_sqlite(path)
    elif tracking_uri.startswith(("postgres", "mysql")):
        tracking_uri = database_url(tracking_uri).render_as_string(hide_password=False)
    return MlflowClient(tracking_uri=tracking_uri)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The SQLite file that a tracking URI names, or None if it names something else."""
    return Path(tracking_uri.removeprefix(_SQLITE)) if tracking_uri.startswith(_SQLITE) else None


def _make_sqlite(path: Path) -> None:
    """Makes MLflow's tables in a draft and moves it into place.

    A process killed while MLflow makes them in place leaves a file that MLflow can never open again
    (seen with 3.17: its migrations do not start over), and two processes at it at once race.
    """
    if _is_made(path):
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if _is_made(path):
            return
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        MlflowClient(tracking_uri=f"{_SQLITE}{draft.resolve() / 'made.db'}").search_experiments(max_results=1)
        # A copy, since MLflow keeps the file that it made open.
        shutil.copyfile(draft / "made.db", draft / "copy.db")
        with (draft / "copy.db").open("rb") as file:
            os.fsync(file.fileno())
        (draft / "copy.db").replace(path)
        sync(path.absolute().parent)
        shutil.rmtree(draft, ignore_errors=True)


def _is_made(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def sync_artifacts(artifact_uri: str, artifact_path: str) -> None:
    """Has a run's artifacts of a folder on the disk, where they lie on one of this machine."""
    if not artifact_uri.startswith("file:"):
        return
    folder = Path(url2pathname(urlsplit(artifact_uri).path)) / artifact_path
    # Those above it are the run's, and the experiment's.
    for path in (*folder.rglob("*"), folder, *list(folder.parents)[:5]):
        sync(path)
