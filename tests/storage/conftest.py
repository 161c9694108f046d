"""A store in a folder, and a trial's files in it as a worker leaves them."""

import json
from pathlib import Path

import pytest

from dtr_ray.storage.store import Store
from dtr_ray.storage.trial_copy import TrialCopy
from dtr_ray.training.checksums import write_checksums


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store" / "tiny").as_uri()


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


class Node:
    """A machine's scratch folder, and what a worker does there to one trial."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.folder = root / "trials" / "t0000"
        self.records = root / "tracking" / "t0000" / "worker.jsonl"
        self.copy: TrialCopy | None = None

    def begin(self, epoch: int = 1) -> TrialCopy:
        self.copy = TrialCopy(Store(self.url), "t0000", epoch, self.folder, self.records)
        self.copy.fetch()
        self.copy.start()
        return self.copy

    def save(self, step: int, keep: set[int] = frozenset()) -> None:
        """Writes a checkpoint, and removes all others but those to keep."""
        folder = self.folder / "checkpoints" / f"{step:08d}"
        hidden = folder.with_name(f".{folder.name}.part")
        hidden.mkdir(parents=True)
        (hidden / "model.safetensors").write_text(f"weights of step {step}")
        write_checksums(hidden)
        hidden.rename(folder)
        for other in folder.parent.glob("[0-9]*"):
            if int(other.name) not in {step, *keep}:
                for file in other.iterdir():
                    file.unlink()
                other.rmdir()

    def best(self, step: int) -> None:
        (self.folder / "best.json").write_text(json.dumps({"step": step}))

    def log(self, *steps: int) -> None:
        self.records.parent.mkdir(parents=True, exist_ok=True)
        with self.records.open("a") as file:
            for step in steps:
                record = {
                    "kind": "metrics",
                    "time_ms": 1000 + step,
                    "step": step,
                    "values": {"loss": step / 2},
                }
                file.write(json.dumps(record) + "\n")

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in (self.folder / "checkpoints").glob("[0-9]*"))


@pytest.fixture
def nodes(tmp_path: Path, url: str) -> dict[str, Node]:
    return {name: Node(tmp_path / name, url) for name in ("one", "two", "three")}
