"""How far records were sent is known after a crash at any byte, or too little of it is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.service import positions
from dtr_ray.service.positions import Positions

NAMES = [f"t{number}/driver.jsonl" for number in range(4)]
SAVES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["", "t0", "t1", "t2", "gone"])),
    min_size=1,
    max_size=30,
)


def save_all(path: Path, saves: list[tuple[str, str]]) -> list[tuple[dict[str, int], dict[str, str]]]:
    """Makes the saves; returns what was known after each, after none first."""
    kept, offsets, run_ids = Positions(path, "here"), dict[str, int](), dict[str, str]()
    known = [({}, {})]
    for number, (name, run_key) in enumerate(saves, 1):
        offsets[name] = 10 * number
        if run_key == "gone":
            run_ids.clear()
        elif run_key:
            run_ids[run_key] = f"id{number}"
        kept.save({name: offsets[name]}, run_ids)
        known.append((dict(offsets), dict(run_ids)))
    return known


def read(path: Path, destination: str = "here") -> tuple[dict[str, int], dict[str, str]]:
    found = Positions(path, destination)
    offsets = {name: found.offset(name) for name in NAMES if found.offset(name)}
    return offsets, found.run_ids


@settings(max_examples=30)
@given(SAVES, st.integers(0, 400), st.floats(0, 1))
def test_what_was_saved_is_read_and_a_torn_end_costs_the_newest_alone(
    tmp_path_factory: pytest.TempPathFactory, saves: list[tuple[str, str]], room: int, cut: float
) -> None:
    path = tmp_path_factory.mktemp("positions") / "state.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "_MIN_APPENDED_BYTES", room)
        known = save_all(path, saves)
        assert read(path) == known[-1]
        assert read(path, "elsewhere") == ({}, {})
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole))])
        torn = read(path)
        assert torn in known
        # And it goes on from there.
        again = Positions(path, "here")
        again.save({"t9/worker.jsonl": 7}, {**torn[1], "t9": "new"})
        assert Positions(path, "here").offset("t9/worker.jsonl") == 7
        assert read(path) == (torn[0], {**torn[1], "t9": "new"})


def test_many_runs_are_not_written_anew_for_every_portion(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    kept, run_ids, num_new_files = Positions(path, "here"), dict[str, str](), 0
    for number in range(100):
        before = path.stat().st_ino if number else 0
        run_ids[f"t{number}"] = f"{number:032x}"
        kept.save({f"t{number}/driver.jsonl": number, f"t{number}/worker.jsonl": number}, run_ids)
        num_new_files += path.stat().st_ino != before
    assert num_new_files == 1
    assert Positions(path, "here").run_ids == run_ids


def test_a_disk_that_fails_is_warned_of_once_and_all_is_written_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Positions(tmp_path / "state.json", "here")
    kept.save({NAMES[0]: 1}, {"t0": "id"})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(positions.os, "fsync", full)
        kept.save({NAMES[1]: 2}, {"t0": "id"})
        kept.save({NAMES[2]: 3}, {"t0": "id"})
    (record,) = caplog.records
    assert record.message.endswith("a new start would send records again")
    kept.save({}, {"t0": "id"})
    assert read(tmp_path / "state.json") == ({NAMES[0]: 1, NAMES[1]: 2, NAMES[2]: 3}, {"t0": "id"})
