"""A sweep that moves from one head to another, through the store alone."""

import json
from pathlib import Path

import pytest

from dtr_ray.storage import lease
from dtr_ray.storage.store import Store
from dtr_ray.storage.sweep_copy import SweepCopy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "_STALE_S", 0.5)
    monkeypatch.setattr(lease, "_RENEW_S", 0.5)
    monkeypatch.setattr("dtr_ray.storage.sweep_copy._EVERY_S", 0.1)
    # Of another machine, as it were: this one's process is not asked for.
    monkeypatch.setattr(lease, "_is_gone", lambda found: False)


class Head:
    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.copy = SweepCopy(Store(url), folder)
        self.fenced: list[str] = []

    def begin(self) -> "Head":
        self.copy.fetch()
        self.copy.take()
        self.copy.start(self.fenced.append)
        return self

    def write(self, line: str) -> None:
        with (self.folder / "journal.jsonl").open("a") as file:
            file.write(line + "\n")

    def event(self, line: str) -> None:
        self.write(line)
        self.copy.push_journal()

    def events(self) -> list[str]:
        return (self.folder / "journal.jsonl").read_text().split()


def test_another_head_goes_on_with_every_event(tmp_path: Path, url: str):
    one, two = Head(tmp_path / "one", url), Head(tmp_path / "two", url)
    one.copy.take()
    (one.folder / "identity").write_text("me")
    (one.folder / "tracking/sweep").mkdir(parents=True)
    (one.folder / "tracking/sweep/driver.jsonl").write_text("record\n")
    one.copy.start(one.fenced.append)
    one.event("a")
    one.event("b")
    one.copy.close(ended=True)
    two.begin()
    assert two.events() == ["a", "b"]
    assert (two.folder / "identity").read_text() == "me"
    assert (two.folder / "tracking/sweep/driver.jsonl").read_text() == "record\n"
    assert two.copy.epoch == 2
    names = {entry.name.split("/")[0] for entry in Store(url).entries()}
    assert names == {"identity", "journal", "leases", "tracking"}
    assert len(Store(url).entries("leases")) == 1


def test_a_head_that_is_there_still_is_not_taken_over(tmp_path: Path, url: str):
    one = Head(tmp_path / "one", url).begin()
    two = Head(tmp_path / "two", url)
    with pytest.raises(ValueError, match=r"another process .* runs the sweep"):
        two.begin()
    assert not one.fenced
    one.copy.close(ended=True)


def test_a_head_that_was_cut_off_is_fenced_and_its_later_events_do_not_count(tmp_path: Path, url: str):
    one = Head(tmp_path / "one", url).begin()
    one.event("a")
    one.copy._ending.set()
    two = Head(tmp_path / "two", url).begin()
    two.event("b")
    one.event("lost")
    one.copy._ending.clear()
    one.copy._run(one.copy._lease, one.fenced.append)
    assert len(one.fenced) == 1
    assert "process" in one.fenced[0]
    two.copy.close(ended=True)
    one_again = Head(one.folder, url).begin()
    assert one_again.events() == ["a", "b"]
    assert (tmp_path / "one.before/journal.jsonl").read_text().split() == ["a", "lost"]
    one_again.copy.close(ended=True)


def test_the_same_head_keeps_what_was_on_its_way(tmp_path: Path, url: str):
    one = Head(tmp_path / "one", url).begin()
    one.event("a")
    one.write("b")
    one.copy._ending.set()
    again = Head(one.folder, url).begin()
    assert again.events() == ["a", "b"]
    assert json.loads(Store(url).get(f"leases/{again.copy._lease.writer}.json"))["whole"]
    again.copy.close(ended=True)


def test_a_head_that_dies_while_it_takes_over_changes_nothing(tmp_path: Path, url: str):
    one = Head(tmp_path / "one", url).begin()
    one.event("a")
    one.copy.close(ended=True)
    two = Head(tmp_path / "two", url)
    two.copy.take()
    three = Head(tmp_path / "three", url).begin()
    assert three.events() == ["a"]
    assert three.copy.epoch == 3
    three.copy.close(ended=True)


def test_a_folder_of_a_sweep_that_the_store_does_not_have_is_set_aside(tmp_path: Path, url: str):
    one = Head(tmp_path / "one", url)
    one.folder.mkdir()
    one.write("old")
    one.copy.fetch()
    assert not (one.folder / "journal.jsonl").exists()
    assert (tmp_path / "one.before/journal.jsonl").read_text() == "old\n"
