"""A cloud's notice that it takes a machine back, from a real server, and what Ray makes of it.

What is slow takes half a minute:

    python -m pytest -m slow tests/service/test_notice.py -n 0 -s --timeout 300
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray._private.state import state as cluster_state
from ray_machines import Machines
from tiny_sweeps import ROOT, wait_until

from dtr_ray.service import notice
from dtr_ray.service.notice import aws_notice, gcp_notice, wait_for_notice


class Metadata(ThreadingHTTPServer):
    """Both clouds' metadata servers; `left_s` once they take the machine back."""

    left_s: float | None = None
    broken = False

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        right = self.path == "/latest/api/token" and ttl is not None and 1 <= int(ttl) <= 21600
        self._answer(200 if right else 400, "a-token")

    def do_GET(self) -> None:
        left_s = self.server.left_s
        if self.server.broken:
            self._answer(503, "later")
        elif self.path == "/latest/meta-data/spot/instance-action":
            end = datetime.now(UTC) + timedelta(seconds=left_s or 0)
            text = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
            known = self.headers.get("X-aws-ec2-metadata-token") == "a-token"
            self._answer(401 if not known else 404 if left_s is None else 200, text)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if known else 403, "FALSE" if left_s is None else "TRUE")
        else:
            self._answer(404, "")

    def log_request(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_each_cloud_s_notice_is_understood(metadata: Metadata):
    assert aws_notice(metadata.name) is None
    assert gcp_notice(metadata.name) is None
    metadata.left_s = 90.0
    assert aws_notice(metadata.name) == pytest.approx(90, abs=3)
    assert gcp_notice(metadata.name) == 30.0


def test_a_clock_that_is_wrong_by_days_changes_no_notice(metadata: Metadata, monkeypatch: pytest.MonkeyPatch):
    metadata.left_s = 90.0
    right = time.time
    for days in (-3, 3):
        monkeypatch.setattr(notice.time, "time", lambda days=days: right() + days * 86400)
        assert aws_notice(metadata.name) in (0.0, 120.0)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_server_that_fails_is_asked_again(cloud: str, metadata: Metadata, caplog: pytest.LogCaptureFixture):
    metadata.broken = True

    def mend() -> None:
        metadata.broken, metadata.left_s = False, 100.0

    threading.Timer(0.3, mend).start()
    assert wait_for_notice(cloud, metadata.name, poll_s=0.05) >= 30.0
    assert len([line for line in caplog.messages if "does not say whether" in line]) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_machine_that_is_taken_back_is_drained(metadata: Metadata, tmp_path: Path, shared_cache: Path):
    machines = Machines(0, 0)
    environment = {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": machines.cluster.address, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-m", "dtr_ray.service.notice", "aws", "--server", metadata.name]
    try:
        with subprocess.Popen(words, env=environment) as process:
            time.sleep(3.0)
            assert cluster_state.get_draining_nodes() == {}
            metadata.left_s = 100.0
            assert process.wait(120.0) == 0
        # Nothing runs on it, so it may be gone already.
        wait_until(lambda: cluster_state.get_draining_nodes() or not ray.nodes()[0]["Alive"], 10.0)
    finally:
        machines.end()
