"""Commands that are given an address: what they fetch, and how they refuse one that is of no use."""

import json
from pathlib import Path

import pytest
from storage.conftest import Node

from dtr_ray import sweep as sweep_command
from dtr_ray.service.store_checks import DRIVER_TOKEN, probe_in_store, read_there, write_there
from dtr_ray.storage.fetching import fetch_folder, put_beside
from dtr_ray.storage.store import Store
from dtr_ray.storage.sweep_copy import SweepCopy


@pytest.fixture
def sweep_url(tmp_path: Path, url: str, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a sweep with one trial, whose checkpoints of steps 10 (the best) and 20 were kept."""
    monkeypatch.setenv("DTR_RAY_SCRATCH", str(tmp_path / "scratch"))
    copy = SweepCopy(Store(url), tmp_path / "head")
    copy.take()
    best = {"checkpoint": "trials/t0000/checkpoints/00000010"}
    for name, content in (("best.json", json.dumps(best)), ("sweep.json", "{}"), ("journal.jsonl", "{}\n")):
        (copy.folder / name).write_text(content)
    copy.start(lambda who: None)
    node = nodes["one"]
    worker = node.begin()
    node.save(10)
    node.best(10)
    worker.flush()
    node.save(20, keep={10})
    worker.close()
    copy.close(ended=True)
    return url


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_a_sweep_the_best_checkpoint_is_fetched_or_all_or_none(sweep_url: str):
    small = {"best.json", "sweep.json", "journal.jsonl"}
    assert names(fetch_folder(sweep_url, "none")) == small
    best = {f"trials/t0000/checkpoints/00000010/{name}" for name in ("manifest.json", "model.safetensors")}
    assert names(fetch_folder(sweep_url)) == small | best | {"trials/t0000/best.json"}
    everything = names(fetch_folder(sweep_url, "all"))
    assert {name.replace("10/", "20/") for name in best} < everything


def test_a_trial_or_a_checkpoint_of_it_is_fetched_alone(sweep_url: str):
    trial = fetch_folder(f"{sweep_url}/trials/t0000")
    assert trial.name == "t0000"
    assert {path.name for path in (trial / "checkpoints").iterdir()} == {"00000010", "00000020"}
    checkpoint = fetch_folder(f"{sweep_url}/trials/t0000/checkpoints/00000010")
    assert (checkpoint / "model.safetensors").read_text() == "weights of step 10"


def test_a_table_goes_where_the_sweep_is(sweep_url: str, tmp_path: Path):
    (tmp_path / "compare.csv").write_text("a,b\n")
    put_beside(sweep_url, tmp_path / "compare.csv")
    assert Store(sweep_url).get("compare.csv") == b"a,b\n"


def test_a_folder_of_plain_files_is_fetched_whole(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTR_RAY_SCRATCH", str(tmp_path / "scratch"))
    Store(url).put("export/transformer/weights", b"w")
    assert names(fetch_folder(f"{url}/export")) == {"transformer/weights"}


@pytest.mark.parametrize("place", ["absent", "trials/t0009", "trials/t0000/checkpoints/00000030"])
def test_what_is_not_there_is_told_in_one_line(sweep_url: str, place: str):
    with pytest.raises(ValueError, match=r"^file://[^\n]+(there is n|no such)[^\n]+$"):
        fetch_folder(f"{sweep_url}/{place}")


BAD = {
    "s3://KEY:pl4nted@bucket/runs": "keys do not belong",
    "s4://bucket/runs": "no store that is known",
    "file:///proc/nowhere": "cannot be used",
}


@pytest.mark.parametrize("output", BAD)
def test_a_sweep_into_a_store_that_cannot_be_used_ends_with_code_2_before_anything(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DTR_RAY_SCRATCH", str(tmp_path / "scratch"))
    quickstart = str(Path(__file__).parents[2] / "search_spaces/quickstart.yaml")
    assert sweep_command.main([quickstart, "--output", output]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert BAD[output] in said[0]
    assert "pl4nted" not in said[0]
    assert not (tmp_path / "scratch").exists()


def test_the_doctor_writes_and_reads_a_store_and_leaves_nothing(url: str, store: Store):
    with probe_in_store(url) as (probe, token, fault):
        assert fault == ""
        assert write_there(probe, "node", token) == ""
        assert read_there(probe, "node") == f"{token} node"
        assert "something else" in write_there(probe, "node", "another")
        assert read_there(probe, DRIVER_TOKEN) == token
        assert "cannot read" in write_there(f"{url}/absent", "node", token)
    assert store.entries() == []
    with probe_in_store("file:///proc/nowhere") as (probe, _, fault):
        assert probe == ""
        assert "cannot be used" in fault
