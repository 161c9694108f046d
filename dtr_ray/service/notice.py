"""Tells Ray that this machine is to go, as soon as its cloud says so: `python -m dtr_ray.service.notice aws`.

For workers that the cloud may take back (spot, preemptible). It asks the machine's metadata server every few
seconds, and has Ray drain the machine at the notice: trials on it write a checkpoint and go on elsewhere.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.core.generated import autoscaler_pb2

log = logging.getLogger(__name__)

_POLL_S = 5.0
_TIMEOUT_S = 2.0
_SESSION_S = "21600"
# From a spot notice to the end, where the cloud does not say.
_LEFT_S = {"aws": 120.0, "gcp": 30.0}
_SERVERS = {"aws": "169.254.169.254", "gcp": "metadata.google.internal"}


def aws_notice(server: str) -> float | None:
    """Seconds that EC2 leaves a spot instance, or None: it has given no notice.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": _SESSION_S}
    status, token = _ask(server, "PUT", "/latest/api/token", ttl)
    if status != 200:
        raise HTTPException(f"no token: {status}")
    headers = {"X-aws-ec2-metadata-token": token}
    status, text = _ask(server, "GET", "/latest/meta-data/spot/instance-action", headers)
    if status == 404:
        return None
    if status != 200:
        raise HTTPException(f"no answer: {status}")
    end = datetime.fromisoformat(json.loads(text)["time"]).timestamp()
    # The clock may be wrong; the notice is never longer.
    return min(max(0.0, end - time.time()), _LEFT_S["aws"])


def gcp_notice(server: str) -> float | None:
    """Seconds that Compute Engine leaves a spot VM, or None: it has given no notice.

    https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
    """
    status, text = _ask(
        server, "GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
    )
    if status != 200:
        raise HTTPException(f"no answer: {status}")
    return _LEFT_S["gcp"] if text.strip() == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": aws_notice, "gcp": gcp_notice}
"""How to ask each cloud's metadata server (HOST or HOST:PORT)."""


def wait_for_notice(cloud: str, server: str, poll_s: float = _POLL_S) -> float:
    """Waits for the notice; returns the seconds left. A server that does not answer is asked again."""
    warned = False
    while True:
        try:
            left_s = CLOUDS[cloud](server)
            warned = False
            if left_s is not None:
                return left_s
        except (OSError, HTTPException, ValueError, KeyError) as error:
            if not warned:
                log.warning(
                    "the metadata server %s does not say whether this machine is to go: %s", server, error
                )
            warned = True
        time.sleep(poll_s)


def drain_this_machine(left_s: float, reason: str) -> bool:
    """Has the Ray cluster of this machine drain it; returns whether it takes that on."""
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        node = ray.get_runtime_context().get_node_id()
        kinds: Any = autoscaler_pb2
        raylet: Any = ray._raylet
        kind = kinds.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until_ms = int((time.time() + left_s) * 1000)
        # Written in Cython, without types.
        client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        accepted, why_not = client.drain_node(node, kind, reason, until_ms)
        if not accepted:
            log.error("Ray does not drain this machine: %s", why_not)
        return bool(accepted)
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when the machine is being drained, or when another process looks after that."""
    parser = argparse.ArgumentParser(prog="python -m dtr_ray.service.notice", description=__doc__)
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--server", help="HOST:PORT of the metadata server; default: the cloud's")
    options = parser.parse_args(arguments)
    try:
        with FileLock(Path(tempfile.gettempdir()) / "dtr_ray_notice.lock", timeout=0):
            left_s = wait_for_notice(options.cloud, options.server or _SERVERS[options.cloud])
            log.warning("%s takes this machine back in %.0f s", options.cloud, left_s)
            return 0 if drain_this_machine(left_s, f"{options.cloud} takes it back") else 1
    except Timeout:
        return 0


def _ask(server: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = HTTPConnection(server, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
