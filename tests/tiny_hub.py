"""A hub of models on this machine: speaks as much of the Hugging Face hub's HTTP as its library asks for."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

COMMIT = "c0ffee" + "0" * 34
LARGE = 2000
"""Files of more bytes are as those of Git LFS: with a SHA-256."""


@dataclass
class Trouble:
    """What the server does wrong, for as many answers as `times`."""

    kind: str
    """`cut`, `wrong byte`, `wait` or an HTTP status."""
    times: int = 1
    file: str = ".safetensors"
    """End of the address."""


@dataclass
class TinyHub:
    """Files of repositories by name, what has been asked for, and what goes wrong."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    """Of each repository's `main`, where it is not COMMIT."""
    single: dict[str, bytes] = field(default_factory=dict)
    """Files that lie at the top, as on a mirror."""
    asked: Counter[str] = field(default_factory=Counter)
    """`METHOD path`."""
    ranges: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)
    """Set when half of a file has gone out and the rest waits."""
    sent: int = 0
    """Bytes of files."""

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        """A repository with a folder's files."""
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.files[name] = found | {key.replace("__", "/"): content for key, content in more.items()}

    def downloads(self) -> dict[str, int]:
        """How often each file was asked for by GET."""
        return {
            path.rpartition("/")[2]: count
            for path, count in self.asked.items()
            if path.startswith("GET") and "/api/" not in path
        }

    def trouble(self, path: str) -> Trouble | None:
        for trouble in self.troubles:
            if trouble.times and path.endswith(trouble.file):
                trouble.times -= 1
                return trouble
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: TinyHub

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[f"{self.command} {path}"] += 1
        trouble = self.hub.trouble(path) if body else None
        if trouble is not None and trouble.kind.isdigit():
            self._refuse(int(trouble.kind), "")
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            found = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
            name, revision, file = found.groups() if found else ("", "", path[1:])
            content = (self.hub.files.get(name, {}) if found else self.hub.single).get(file)
            if content is None or (found and revision not in ("main", self._commit(name))):
                self._refuse(404, "EntryNotFound")
            else:
                self._file(content, self._commit(name), trouble, body=body)

    def _commit(self, name: str) -> str:
        return self.hub.commits.get(name, COMMIT)

    def _api(self, path: str) -> None:
        name, _, rest = path.partition("/revision/")
        name, tree, commit = name.partition("/tree/")
        if name not in self.hub.files:
            self._refuse(401, "RepoNotFound")
        elif (rest or commit).removesuffix("?") not in ("", "main", self._commit(name)):
            self._refuse(404, "RevisionNotFound")
        elif tree:
            self._json([{"type": "file", "path": f, **facts(c)} for f, c in self.hub.files[name].items()])
        else:
            files = [
                {"rfilename": f, "blobId": facts(c)["oid"], **facts(c)}
                for f, c in self.hub.files[name].items()
            ]
            self._json({"id": name, "sha": self._commit(name), "siblings": files})

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, content: bytes, commit: str, trouble: Trouble | None, *, body: bool) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            self.hub.ranges.append(self.headers["Range"])
        if start >= len(content):
            self._refuse(416, "")
            return
        if trouble is not None and trouble.kind == "wrong byte":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(206 if start else 200)
        known = facts(content)
        etag = known["lfs"]["sha256"] if "lfs" in known else known["oid"]
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if "lfs" in known:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self._send(content[start:], trouble)

    def _send(self, data: bytes, trouble: Trouble | None) -> None:
        if trouble is not None and trouble.kind in ("cut", "wait"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.hub.sent += len(data) // 2
            if trouble.kind == "wait":
                self.hub.waiting.set()
                threading.Event().wait(20)
            self.close_connection = True
            return
        self.wfile.write(data)
        self.hub.sent += len(data)


def facts(content: bytes) -> dict:
    """As the hub states them of a file."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict = {"size": len(content), "oid": blob}
    if len(content) > LARGE:
        value = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": value, "sha256": value, "size": len(content), "pointerSize": 130}
    return found


@contextmanager
def tiny_hub() -> Iterator[TinyHub]:
    """A hub that is served while in the context."""
    hub = TinyHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def write_vae(folder: Path, seed: int = 0, *, safe: bool = True) -> Path:
    """A VAE of the released ones' architecture, but narrow: 8 x 8 pixels to a latent of 4 channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=256,
        )
    vae.save_pretrained(folder, safe_serialization=safe)
    return folder
