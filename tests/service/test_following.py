"""What trials put into a store reaches the driver's folder, each step of each metric once."""

import json
from pathlib import Path

import pytest
from storage.conftest import Node

from dtr_ray.service.following import Follower
from dtr_ray.service.records import read_lines, record_path
from dtr_ray.storage.store import Store


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store" / "tiny").as_uri()


def logged(folder: Path) -> list[int]:
    lines = read_lines(record_path(folder, "t0000", "worker"), 0)
    return [line.record["step"] for line in lines if line.record is not None]


def test_signs_of_life_pictures_and_records_arrive_but_no_checkpoints(tmp_path: Path, url: str):
    node, head = Node(tmp_path / "node", url), tmp_path / "head"
    copy = node.begin()
    node.save(10)
    (node.folder / "progress.json").write_text(json.dumps({"step": 12, "phase": "training", "time": 1.0}))
    (node.folder / "grids").mkdir()
    (node.folder / "grids/00000010.png").write_bytes(b"picture")
    node.log(4, 8)
    copy.flush()
    follower = Follower(Store(url), head)
    follower.pull()
    trial = head / "trials/t0000"
    assert json.loads((trial / "progress.json").read_text())["step"] == 12
    assert (trial / "grids/00000010.png").read_bytes() == b"picture"
    assert not (trial / "checkpoints").exists()
    assert logged(head) == [4, 8]
    node.log(12)
    copy.flush()
    follower.pull("t0000")
    assert logged(head) == [4, 8, 12]
    follower.close()


def test_records_of_two_attempts_are_one_file_without_doubles(tmp_path: Path, url: str):
    one, two = Node(tmp_path / "one", url), Node(tmp_path / "two", url)
    first = one.begin()
    one.save(8)
    one.log(4, 8, 12, 16)
    first.flush()
    live = Follower(Store(url), tmp_path / "live")
    live.pull()
    second = two.begin()
    two.log(12, 16, 20)
    second.flush()
    live.pull()
    assert logged(tmp_path / "live") == [4, 8, 12, 16, 20]
    other = Follower(Store(url), tmp_path / "other")
    other.pull()
    assert logged(tmp_path / "other") == [4, 8, 12, 16, 20]
    again = Follower(Store(url), tmp_path / "live")
    again.pull()
    assert logged(tmp_path / "live") == [4, 8, 12, 16, 20]


def test_what_a_former_process_adds_later_does_not_count(tmp_path: Path, url: str):
    one, two = Node(tmp_path / "one", url), Node(tmp_path / "two", url)
    first = one.begin()
    one.log(4, 8)
    first.flush()
    second = two.begin()
    two.log(8, 12)
    second.flush()
    live = Follower(Store(url), tmp_path / "live")
    live.pull()
    # It has not seen yet that it was superseded: that is looked for once in a while.
    one.log(12, 16, 20)
    first.flush()
    two.log(16)
    second.flush()
    live.pull()
    # As a new head fetches it, with the driver's own records.
    Store(url).get_file("tracking/t0000/cuts.json", tmp_path / "other/tracking/t0000/cuts.json")
    other = Follower(Store(url), tmp_path / "other")
    other.pull()
    for head in ("live", "other"):
        lines = read_lines(record_path(tmp_path / head, "t0000", "worker"), 0)
        assert logged(tmp_path / head) == [4, 8, 12, 16]
        assert [line.record["time_ms"] for line in lines] == [1004, 1008, 1012, 1016]
