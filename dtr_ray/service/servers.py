"""The doctor's checks of the servers that a sweep writes to: MLflow, and the Optuna study's database."""

import base64
import importlib.metadata
import json
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dtr_ray.config.sweep import StorageConfig
from dtr_ray.search.database import check_database, without_password
from dtr_ray.service.cluster_answers import Case
from dtr_ray.service.findings import Finding, fail, in_a_line, ok, warning
from dtr_ray.service.mlflow_client import check_uri, sqlite_path
from dtr_ray.service.tracking import default_tracking_uri

_REQUEST_TIMEOUT_S = 10.0
_SEARCH = "api/2.0/mlflow/experiments/search"


def check_mlflow(case: Case) -> Iterator[Finding]:
    """MLflow takes what this process would send; nothing is sent."""
    uri = (case.config and case.config.tracking.uri) or default_tracking_uri(case.output)
    try:
        check_uri(uri)
    except ValueError as error:
        yield fail(str(error), "set tracking.uri or MLFLOW_TRACKING_URI to one of these")
        return
    path = sqlite_path(uri)
    if path is not None:
        yield _check_file(path)
    elif uri.startswith(("http://", "https://")):
        yield from _check_server(uri.rstrip("/"))
    else:
        yield _check_database("tracking.uri", uri)


def check_study(case: Case) -> Iterator[Finding]:
    """The database of Optuna's study answers; without one the study is a file in the sweep's folder."""
    url = (StorageConfig() if case.config is None else case.config.storage).study
    path = None if url is None else sqlite_path(url)
    if url is None:
        yield ok("SQLite in the sweep's folder")
    else:
        yield _check_database("storage.study", url) if path is None else _check_file(path)


def _check_file(path: Path) -> Finding:
    """A SQLite file that can be opened, or made."""
    mend = "set tracking.uri or storage.study to a file that this machine can write"
    if path.exists():
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
                connection.execute("select count(*) from sqlite_master").fetchone()
        except sqlite3.Error as error:
            return fail(f"{path}: {error}", mend)
        return ok(f"{path} opens")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fail(f"{path} cannot be made: {folder} is no folder that can be written", mend)
    return ok(f"{path}, which a sweep makes")


def _check_server(uri: str) -> Iterator[Finding]:
    """A server: it is there, it lets us in, and it is of the client's version."""
    shown = without_password(uri)
    try:
        version = _request(f"{uri}/version").decode(errors="replace").strip()
        json.loads(_request(f"{uri}/{_SEARCH}", {"max_results": 1}))
    except urllib.error.HTTPError as error:
        with error:
            refused = error.code in (401, 403)
            mend = "set MLFLOW_TRACKING_USERNAME and _PASSWORD to a user of it, and see its --allowed-hosts"
            yield fail(
                f"{shown} answers {error.code} {error.reason}",
                mend if refused else "see the server's own log, and whether tracking.uri is its address",
            )
        return
    except (OSError, ValueError) as error:
        mend = "start the server, or mend tracking.uri (MLFLOW_TRACKING_URI); meanwhile records wait on disk"
        yield fail(f"{shown} is not to be had: {in_a_line(error)}", mend)
        return
    here = importlib.metadata.version("mlflow")
    if version.split(".")[0] != here.split(".")[0]:
        yield warning(f"{shown} is MLflow {version}, here is {here}", "bring both to one major version")
    else:
        yield ok(f"{shown}, version {version} (here {here})")


def _request(url: str, body: dict[str, object] | None = None) -> bytes:
    """What a server answers to us, as MLflow's own client would ask it."""
    data = None if body is None else json.dumps(body).encode()
    within = urlsplit(url)
    url = within._replace(netloc=within.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user or within.username:
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "") if user else unquote(within.password or "")
        user = user or unquote(within.username or "")
        secret = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    elif token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def _check_database(what: str, url: str) -> Finding:
    """A database that answers a question."""
    try:
        check_database(url)
    except ValueError as error:
        return fail(f"{what}: {error}", f"start the database, or mend the address of {what}")
    return ok(f"{what}: {without_password(url)} answers")
