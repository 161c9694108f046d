"""A trial that moves from one machine to another, through the store alone."""

import json
import shutil
from pathlib import Path

import pytest
from storage.conftest import Node

from dtr_ray.config.errors import ConfigError
from dtr_ray.storage.index import Index, read_newest
from dtr_ray.storage.lease import Lease
from dtr_ray.storage.store import Store
from dtr_ray.storage.trial_copy import SupersededError


def test_another_machine_goes_on_from_the_newest_checkpoint(nodes: dict[str, Node], store: Store):
    one, two = nodes["one"], nodes["two"]
    copy = one.begin()
    one.save(10)
    copy.after_checkpoint()
    copy.before_checkpoint()
    one.save(20)
    (one.folder / "reports.jsonl").write_text("report\n")
    copy.flush()
    shutil.rmtree(one.root)
    two.begin()
    assert two.steps() == [20]
    assert (two.folder / "checkpoints/00000020/model.safetensors").read_text() == "weights of step 20"
    assert (two.folder / "reports.jsonl").read_text() == "report\n"
    assert read_newest(store, "t0000").attempt == 2


def test_the_best_and_the_newest_checkpoint_are_kept_in_the_store(nodes: dict[str, Node], store: Store):
    one = nodes["one"]
    copy = one.begin()
    for step, best in ((10, 10), (20, 10), (30, 10), (40, 40)):
        one.save(step, keep={best})
        one.best(best)
        copy.flush()
        assert list(read_newest(store, "t0000").checkpoints()) == sorted({best, step})
    names = [entry.name for entry in store.entries("trials/t0000")]
    assert len(names) == 2
    assert all("/checkpoints/00000040/" in name for name in names)


def test_the_best_one_stays_while_a_better_one_is_on_its_way(nodes: dict[str, Node], store: Store):
    one = nodes["one"]
    copy = one.begin()
    one.save(10)
    one.best(10)
    copy.flush()
    one.best(20)
    copy.flush()
    assert list(read_newest(store, "t0000").checkpoints()) == [10]


def test_a_damaged_checkpoint_in_the_store_falls_back_to_the_one_before(
    nodes: dict[str, Node], store: Store, caplog: pytest.LogCaptureFixture
):
    one, two = nodes["one"], nodes["two"]
    copy = one.begin()
    one.save(10)
    one.best(10)
    copy.flush()
    one.save(20, keep={10})
    copy.flush()
    damaged = next(e.name for e in store.entries("trials") if e.name.endswith("20/model.safetensors"))
    store.put(damaged, b"weights of step 2\0")
    two.begin()
    assert two.steps() == [10]
    assert "step 20 in the store is damaged" in caplog.text
    two.copy.flush()
    assert list(read_newest(store, "t0000").checkpoints()) == [10]


def test_a_former_process_overwrites_nothing_and_ends(nodes: dict[str, Node], store: Store):
    one, two = nodes["one"], nodes["two"]
    old = one.begin()
    one.save(10)
    old.flush()
    new = two.begin()
    one.save(20)
    with pytest.raises(SupersededError, match="another process"):
        old.flush()
    with pytest.raises(SupersededError):
        old.check()
    two.save(30)
    new.flush()
    index = read_newest(store, "t0000")
    assert list(index.checkpoints()) == [30]
    assert all(store.get(stored.key) for stored in index.files.values())


def test_a_driver_that_was_fenced_off_starts_no_trial(nodes: dict[str, Node], store: Store):
    Lease(store, 3).renew()
    with pytest.raises(SupersededError, match="runs the sweep now"):
        nodes["one"].begin(epoch=2)
    nodes["two"].begin(epoch=3)


def test_what_is_here_and_whole_is_not_fetched_again(nodes: dict[str, Node], store: Store):
    one = nodes["one"]
    copy = one.begin()
    one.save(10)
    copy.flush()
    file = one.folder / "checkpoints/00000010/model.safetensors"
    before = file.stat().st_ino
    one.begin()
    assert file.stat().st_ino == before
    file.write_text("weights of step 1\0")
    one.begin()
    assert file.read_text() == "weights of step 10"


def test_an_end_gives_the_disk_back_and_leaves_all_in_the_store(nodes: dict[str, Node], store: Store):
    one = nodes["one"]
    copy = one.begin()
    one.save(10)
    (one.folder / "grids").mkdir()
    (one.folder / "grids/00000010.png").write_bytes(b"picture")
    one.log(1, 2)
    copy.close()
    assert not one.folder.exists()
    index = read_newest(store, "t0000")
    assert index.records_bytes > 0
    assert {*index.files} == {
        "grids/00000010.png",
        "checkpoints/00000010/manifest.json",
        "checkpoints/00000010/model.safetensors",
    }


GOOD = {"writer": "w", "attempt": 1, "files": {}, "texts": {}, "records_bytes": 0}
STORED = {"key": "k", "size": 1, "sha256": ""}
BAD = {
    "no JSON": "{",
    "a file outside": json.dumps({**GOOD, "files": {"../x": STORED}}),
    "an object outside": json.dumps({**GOOD, "files": {"x": {**STORED, "key": "/etc/passwd"}}}),
    "a text outside": json.dumps({**GOOD, "texts": {"/x": "y"}}),
    "no writer": "{}",
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_index_is_refused(name: str):
    with pytest.raises(ConfigError, match="somewhere"):
        Index.decoded(BAD[name].encode(), "somewhere")


def test_an_index_is_read_as_it_was_written(nodes: dict[str, Node], store: Store, tmp_path: Path):
    one = nodes["one"]
    copy = one.begin()
    one.save(10)
    copy.flush()
    index = read_newest(store, "t0000")
    assert Index.decoded(index.encoded(), "x") == index
