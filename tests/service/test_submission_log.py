"""A job's log is shown whole and once, over connections that break; a small server speaks Ray's protocol."""

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from dtr_ray import log_lines
from dtr_ray.log_lines import LineStream
from dtr_ray.service import submission_client
from dtr_ray.service.submission_client import connect, follow

LOG = [f"line {number}\n" for number in range(40)]


@dataclass
class Server:
    """Breaks the connection after so many chunks of the log, each time in turn; then it lets it be."""

    breaks: list[int]
    url: str = ""
    status: str = "SUCCEEDED"
    code: int | None = 0
    tails: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        )

    async def job(self, request: web.Request) -> web.Response:
        values: dict[str, Any] = {
            "type": "SUBMISSION",
            "submission_id": "a@1",
            "entrypoint": "",
            "message": "",
        }
        return web.json_response({**values, "status": self.status, "driver_exit_code": self.code})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        stop = self.breaks[self.tails] if self.tails < len(self.breaks) else len(LOG)
        self.tails += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = "".join(LOG)
        # Chunks that are no whole lines.
        for start in range(0, min(len(text), stop * 7), 7):
            await socket.send_str(text[start : start + 7])
        if stop < len(LOG):
            assert request.transport is not None
            request.transport.abort()
        else:
            for start in range(stop * 7, len(text), 7):
                await socket.send_str(text[start : start + 7])
            await socket.close()
        return socket

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/jobs/{id}", self.job)
        app.router.add_get("/api/jobs/{id}/logs/tail", self.tail)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(submission_client, "_RETRY_S", 0.01)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    found = Server(breaks=[3, 3, 10])
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    assert found.ready.wait(10.0)
    yield found
    found.loop.call_soon_threadsafe(found.loop.stop)
    thread.join(10.0)


def test_each_line_is_shown_once_however_often_the_connection_breaks(
    server: Server, capsys: pytest.CaptureFixture[str]
):
    job = follow(connect(server.url), "a@1")
    printed = capsys.readouterr()
    assert printed.out == "".join(LOG)
    assert job is not None
    assert job.driver_exit_code == 0
    assert server.tails == 4
    assert "out of sight" in printed.err


def test_a_cluster_that_stays_away_is_given_up(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission_client, "_GIVE_UP_S", 0.2)
    client = connect(server.url)
    server.breaks = [0] * 10_000
    assert follow(client, "a@1") is None
    assert capsys.readouterr().out == ""


def test_of_a_sweep_that_speaks_json_every_line_is_json_once():
    stream = io.StringIO()
    out = LineStream(stream)
    said = log_lines.line("WARNING", "told there", trial="t0003")
    out.write(f"Running entrypoint for job a@1\n{said}\nerror: no such file\n")
    ours, theirs, error = map(json.loads, stream.getvalue().splitlines())
    assert ours["message"] == "Running entrypoint for job a@1"
    assert theirs == json.loads(said)
    assert error["level"] == "ERROR"
