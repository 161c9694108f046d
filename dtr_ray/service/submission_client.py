"""Ray's job server: where it is, what it is asked, and a job's log as it grows.

It speaks HTTP, so it is reached through a tunnel (`ray dashboard`) as well as directly.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.dashboard.utils import ray_address_to_api_server_url, ray_client_address_to_api_server_url
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from dtr_ray.search.database import without_password
from dtr_ray.service import cluster
from dtr_ray.service.findings import in_a_line, within

DEFAULT = "http://127.0.0.1:8265"
_SERVER, _CLUSTER = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
_TIMEOUT_S = (10.0, 120.0)
_PROBE_TIMEOUT_S = 5.0
_ASK_TIMEOUT_S = 60.0
# A log that says nothing for so long is asked for again: a tunnel may have died without a word.
_SILENCE_S = 60.0
_GIVE_UP_S = 300.0
_RETRY_S = 2.0
# They tell of every step, by levels of their own.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.worker",
    "ray.client_builder",
    "ray.util.client_builder",
)
_ACCESS = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"


class Client(JobSubmissionClient):
    """Ray's client, whose requests do not wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT_S, **options})


def connect(address: str | None) -> Client:
    """The job server of a cluster.

    Args:
        address: `http://HOST:PORT` of Ray's dashboard, `ray://HOST:PORT`, `HOST:PORT`, or `auto`; default:
            RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the dashboard on this machine.

    Raises:
        ValueError: nobody answers there, or not to us; the message says what to do.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    known = {"--address": address, **{name: os.environ.get(name) for name in (_SERVER, _CLUSTER)}}
    name, given = next(((name, value) for name, value in known.items() if value), ("--address", DEFAULT))
    url = find_server(given, name)
    # Ray's client prefers this variable to what it is told.
    before = os.environ.pop(_SERVER, None)
    os.environ[_SERVER] = url
    try:
        return within(_ASK_TIMEOUT_S, lambda: Client(url))
    except (AuthenticationError, requests.RequestException, RuntimeError, OSError) as error:
        raise ValueError(_refused(url, error)) from error
    finally:
        os.environ.pop(_SERVER)
        if before is not None:
            os.environ[_SERVER] = before


def find_server(address: str, name: str = "--address") -> str:
    """The URL of a cluster's job server; raises ValueError as `connect`. `name` says where it is from."""
    if address == "local":
        raise ValueError(f"{name} is `local`, where no cluster is: give its dashboard's, http://HOST:8265")
    if address.startswith(("http://", "https://")):
        return _checked(address.rstrip("/"), name)
    if address != "auto":
        cluster.check_answers(address, name, "give that of a cluster that is up")
        plain = f"http://{address}"
        if not address.startswith("ray://") and _is_server(plain):
            return plain
    is_client = address.startswith("ray://")
    ask: Callable[[str], str] = (
        ray_client_address_to_api_server_url if is_client else ray_address_to_api_server_url
    )
    try:
        url = within(_ASK_TIMEOUT_S, lambda: ask(address))
    except Exception as error:  # Ray's own are of many kinds
        raise ValueError(
            f"the Ray cluster at {address} does not tell where its job server is ({in_a_line(error)}): give "
            f"its dashboard's address, http://HOST:8265, or open a tunnel with `ray dashboard`; {_ACCESS} if "
            "it asks for one"
        ) from error
    if address == "auto" or _is_server(url):
        return url
    # The address that it has inside its own network.
    host = address.removeprefix("ray://").rpartition(":")[0]
    return _checked(f"http://{host}:{urlsplit(url).port}", name)


def _checked(url: str, name: str) -> str:
    """The URL, if it has the form of one: whether somebody answers is asked next."""
    try:
        good = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        good = False
    if not good:
        shown = without_password(url)
        raise ValueError(f"{name} {shown[:200]!r} is no address of a job server: give http://HOST:8265")
    return url


def _is_server(url: str) -> bool:
    try:
        answer = requests.get(f"{url}/api/version", timeout=_PROBE_TIMEOUT_S)
        return answer.status_code in (200, 401, 403)
    except requests.RequestException:
        return False


def _refused(url: str, error: BaseException) -> str:
    shown = without_password(url)
    if isinstance(error, AuthenticationError):
        return f"the cluster at {shown} does not know us: {_ACCESS}"
    return (
        f"no Ray job server answers at {shown} ({in_a_line(error)[:150]}): open a tunnel to it with `ray "
        "dashboard CLUSTER.yaml`, or name it with --address http://HOST:8265"
    )


def follow(client: Client, job_id: str) -> JobDetails | None:
    """Prints a job's log as it grows, from its beginning; returns the job when it has ended.

    A connection that is lost is made again; None where that does not succeed for minutes.
    """
    return asyncio.run(_Follower(client, job_id).run())


class _Follower:
    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._seen = 0
        """Characters of the log that are printed."""
        self._rest = ""
        """The beginning of a line."""

    async def run(self) -> JobDetails | None:
        lost_at: float | None = None
        while True:
            before = self._seen
            try:
                await self._tail()
                job = await asyncio.to_thread(self._client.get_job_info, self._job_id)
                if job.status.is_terminal():
                    self._print(self._rest and "\n")
                    return job
                lost_at = None
            except (aiohttp.ClientError, requests.RequestException, RuntimeError, OSError) as error:
                now = time.monotonic()
                if lost_at is None or self._seen > before:
                    lost_at = now
                    said = in_a_line(error)[:100]
                    print(f"warning: the cluster is out of sight ({said}); trying again", file=sys.stderr)
                if now - lost_at > _GIVE_UP_S:
                    return None
            await asyncio.sleep(_RETRY_S)

    async def _tail(self) -> None:
        """Prints what the log has more than what is printed, until it ends or falls silent."""
        chunks = self._client.tail_job_logs(self._job_id)
        place = 0
        try:
            while True:
                chunk = await asyncio.wait_for(anext(chunks), _SILENCE_S)
                new = chunk[max(0, self._seen - place) :]
                place += len(chunk)
                self._seen = max(self._seen, place)
                self._print(new)
        except (StopAsyncIteration, TimeoutError):
            return

    def _print(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            _print_line(line)


def _print_line(line: str) -> None:
    """A line of the job's; errors and warnings to standard error."""
    is_error = line.startswith(("error:", "warning:"))
    print(line, file=sys.stderr if is_error else sys.stdout, flush=True)


def ray_versions(client: Client) -> tuple[str, str]:
    """Ray's version here and on the cluster."""
    return ray.__version__, str(client._server_ray_version)
