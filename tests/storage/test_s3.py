"""The store over S3's own protocol, in half a minute: pytest tests/storage/test_s3.py -m slow -n 0 -s"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import KEYS, S3, s3_server

from dtr_ray import sweep as sweep_command
from dtr_ray.storage.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


def test_objects_large_and_small_come_back_as_they_were_put(server: S3, tmp_path: Path):
    store = Store(server.url("objects"))
    store.check()
    content = os.urandom(30_000_000)
    (tmp_path / "large").write_bytes(content)
    store.put_file("a/large", tmp_path / "large")
    store.put("a/b/small", b"1")
    store.put("a/b/small", b"22")
    assert [(e.name, e.size) for e in store.entries()] == [("a/b/small", 2), ("a/large", len(content))]
    store.get_file("a/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    store.delete(["a/b/small", "absent"])
    store.delete_folder("a")
    store.delete_folder("absent")
    assert store.entries() == []
    with pytest.raises(FileNotFoundError):
        store.get("a/large")


def test_a_server_that_is_silent_for_a_while_is_waited_for(server: S3):
    store = Store(server.url("silent"))
    store.check()
    server.freeze()
    threading.Timer(5, server.thaw).start()
    start = time.monotonic()
    store.put("one", b"1")
    assert 4 < time.monotonic() - start < 60
    assert store.get("one") == b"1"


def test_a_bucket_that_is_not_there_ends_a_sweep_with_code_2_and_one_line(
    server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DTR_RAY_SCRATCH", str(tmp_path / "scratch"))
    quickstart = str(Path(__file__).parents[2] / "search_spaces/quickstart.yaml")
    assert sweep_command.main([quickstart, "--output", "s3://another-bucket/runs"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: the store s3://another-bucket/runs/")
    assert "NO_SUCH_BUCKET" in said[-1]
    assert not (tmp_path / "scratch").exists()


def test_keys_that_the_store_does_not_know_are_one_line_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")
    with s3_server(tmp_path / "log") as strict, pytest.raises(ValueError) as refused:
        Store(strict.url("x")).check()
    assert "INVALID_ACCESS_KEY_ID" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(key in str(refused.value) for key in KEYS.values() if key.startswith("pl4nted"))
