"""Objects in a store: whole or absent, and tried again while the store is away."""

import random
import threading
from pathlib import Path

import pytest
from small_disks import fill, small_disk

from dtr_ray.storage.pieces import PIECE_BYTES, PieceWriter, read_all_pieces, read_pieces
from dtr_ray.storage.store import DamagedError, Store, StoreClosedError


def test_objects_are_put_listed_read_and_removed(store: Store, tmp_path: Path):
    store.check()
    store.put("a/one", b"1")
    store.put("a/b/two", b"22")
    store.put("a/one", b"111")
    assert [(entry.name, entry.size) for entry in store.entries()] == [("a/b/two", 2), ("a/one", 3)]
    assert [entry.name for entry in store.entries("a", deep=False)] == ["a/one"]
    assert store.entries("absent") == []
    assert store.get("a/b/two") == b"22"
    store.get_file("a/one", tmp_path / "here" / "one")
    assert (tmp_path / "here" / "one").read_bytes() == b"111"
    store.delete(["a/one", "absent"])
    store.delete_folder("a/b")
    store.delete_folder("absent")
    assert store.entries() == []


def test_what_is_absent_or_damaged_is_told_at_once(store: Store, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        store.get("absent")
    store.put("one", b"1")
    with pytest.raises(DamagedError, match="not as it was written"):
        store.get_file("one", tmp_path / "one", "0" * 64)
    assert not (tmp_path / "one").exists()
    with pytest.raises(DamagedError, match="leads out"):
        store.get("../one")
    with pytest.raises(FileNotFoundError):
        store.put_file("two", tmp_path / "absent")


def test_a_request_waits_for_a_store_that_is_away(store: Store, tmp_path: Path):
    (tmp_path / "store").write_text("no folder")
    done = threading.Event()

    def put() -> None:
        store.put("one", b"1")
        done.set()

    threading.Thread(target=put, daemon=True).start()
    assert not done.wait(0.3)
    assert store.away_s > 0
    (tmp_path / "store").unlink()
    assert done.wait(10)
    assert store.away_s == 0
    assert store.get("one") == b"1"


def test_requests_wait_for_room_in_a_store_that_is_full(tmp_path: Path):
    before, after = random.Random(0).randbytes(2**20), random.Random(1).randbytes(2**20)
    (tmp_path / "two").write_bytes(after)
    with small_disk(tmp_path / "small", "4m") as folder:
        store = Store(folder.as_uri())
        store.put("one", before)
        ballast = fill(folder)
        requests = [lambda: store.put("one", after), lambda: store.put_file("two", tmp_path / "two")]
        threads = [threading.Thread(target=request, daemon=True) for request in requests]
        for thread in threads:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        assert store.away_s > 0
        assert store.get("one") == before
        ballast.unlink()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert [entry.name for entry in store.entries()] == ["one", "two"]
        assert store.get("one") == store.get("two") == after


def test_nobody_waits_for_a_store_that_was_closed(store: Store, tmp_path: Path):
    (tmp_path / "store").write_text("no folder")
    store.close()
    with pytest.raises(StoreClosedError):
        store.put("one", b"1")


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path):
    (tmp_path / "store").write_text("no folder")
    with pytest.raises(ValueError, match=r"^the store file:.* cannot be used: [^\n]+$"):
        Store((tmp_path / "store" / "x").as_uri()).check()


def test_a_file_that_grows_is_the_same_in_pieces(store: Store, tmp_path: Path):
    path, content = tmp_path / "grows", b""
    writer = PieceWriter(store, "pieces", path)
    writer.push()
    for n, size in enumerate((10, PIECE_BYTES - 12, 1, 3 * PIECE_BYTES + 7, 0, 5)):
        content += bytes([65 + n]) * size + b"\n"
        path.write_bytes(content + b"torn")
        writer.push()
        assert writer.size == len(content)
        assert read_all_pieces(store, "pieces") == content
    assert len(store.entries("pieces")) == -(-len(content) // PIECE_BYTES)
    for start, end in ((0, 5), (PIECE_BYTES - 3, PIECE_BYTES + 3), (20, len(content))):
        assert read_pieces(store, "pieces", start, end) == content[start:end]
    with pytest.raises(DamagedError):
        read_pieces(store, "pieces", 0, len(content) + 1)
    store.delete(["pieces/000000131072"])
    with pytest.raises(DamagedError, match="lacks"):
        read_all_pieces(store, "pieces")
