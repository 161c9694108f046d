"""Clients of MLflow: quiet, quick to fail, and on a SQLite file that is never half made."""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"


def connect(tracking_uri: str) -> "MlflowClient":
    """A client that fails soon rather than retrying for minutes; the caller decides when to try again.

    It sets MLFLOW_HTTP_REQUEST_TIMEOUT (20 s), MLFLOW_HTTP_REQUEST_MAX_RETRIES (0) and
    MLFLOW_DISABLE_TELEMETRY for this process where they are unset, and mutes MLflow's log unless
    MLFLOW_LOGGING_LEVEL is set. Importing MLflow takes seconds.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.ERROR)
    path = sqlite_path(tracking_uri)
    if path is not None:
        _make_sqlite(path)
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
        shutil.rmtree(draft, ignore_errors=True)


def _is_made(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
