"""Job: what a prepared folder is to become, what of it is done, and whether that is still so. No torch."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtr_ray.config.base import Config, flatten
from dtr_ray.config.errors import shown
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.data.manifest import MANIFEST, WORK, FileEntry, Manifest, ShardEntry, SkippedImage
from dtr_ray.preparation.files import remove_partial_files, write_json
from dtr_ray.sources import Source

# Keys that change nothing about the result. Where the source is does not count; its digest does.
_FREE = {"max_corrupt", "num_workers", "output", "feature_weights", "source.path", "source.annotations"}

_OWN_FOLDERS = ("pixels", "latents", f"{WORK}/features", f"{WORK}/shards")


class TooManyCorruptError(ValueError):
    """More images than allowed cannot be read."""

    def __init__(self, skipped: Sequence[SkippedImage], limit: int) -> None:
        super().__init__(skipped, limit)
        self.skipped = list(skipped)
        self.limit = limit

    def __str__(self) -> str:
        lines = "".join(f"\n  {image.reason}" for image in self.skipped)
        return (
            f"{len(self.skipped)} images cannot be read, more than max_corrupt {self.limit}; what is done is "
            f"kept. Mend or remove them, or raise the limit (--set max_corrupt=...):{lines}"
        )


class ShardReport(Config):
    """What became of the images of one shard."""

    number: int
    shard: ShardEntry
    labels: list[int]
    texts: list[list[str]]
    """Captions of each image; empty where none were asked for."""
    skipped: list[SkippedImage]
    digests: list[str]
    """Of each image's pixels."""
    num_enlarged: int
    files: dict[str, FileEntry]
    seconds: float


@dataclass(frozen=True)
class Job:
    """A source to be made into a folder; may be pickled."""

    config: PrepareConfig
    source: Source
    folder: Path

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-len(self.source) // self.config.shard_images)

    @property
    def num_classes(self) -> int:
        """Classes of the result; 1 is unconditional."""
        if self.config.text_encoder is not None:
            return 1
        return self.config.num_classes or self.source.num_classes

    @property
    def work(self) -> Path:
        """Folder of what is needed to go on."""
        return self.folder / WORK

    @property
    def state_file(self) -> Path:
        """Says what the folder was begun as."""
        return self.work / "job.json"

    @property
    def digests_file(self) -> Path:
        """Holds the hashes of the models' weights."""
        return self.work / "models.json"

    def images(self, number: int) -> range:
        """The source's images that are a shard's."""
        start = number * self.config.shard_images
        return range(start, min(start + self.config.shard_images, len(self.source)))

    def features_file(self, extractor: str, number: int) -> Path:
        """Where a shard's features are until the references are made of them: float32 (n, D)."""
        return self.work / "features" / extractor / f"{number:05d}.npy"

    def begin(self) -> None:
        """Takes the folder, or goes on with it; one without a single shard may become something else.

        Raises:
            ValueError: as `check_unfinished`.
        """
        self.check_unfinished()
        if not self._has_shards:
            if self.state_file.is_file():
                for name in _OWN_FOLDERS:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                self.digests_file.unlink(missing_ok=True)
            source = {"digest": self.source.digest, "num_images": len(self.source)}
            write_json(self.state_file, {"config": self.config.to_dict(), "source": source})
        remove_partial_files(self.folder)

    @property
    def _has_shards(self) -> bool:
        return any((self.work / "shards").glob("*.json"))

    def check_unfinished(self) -> None:
        """Looks whether the folder is free, or was begun as what it is to be; changes nothing.

        Raises:
            ValueError: its shards are of another configuration or source, or it holds other things.
        """
        if not self.state_file.is_file():
            if self.folder.exists() and any(path.name != WORK for path in self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} is not empty, and nothing that prepare began: choose another name "
                    "(--set name=...) or --output"
                )
        elif self._has_shards:
            state = _read_state(self.state_file)
            self._compare(state["config"], state["source"]["digest"], state["source"]["num_images"], "begun")

    def check_finished(self, manifest: Manifest) -> None:
        """Raises ValueError where the folder was prepared with another configuration or source."""
        self._compare(manifest.config, manifest.source.digest, manifest.source.num_images, "prepared")

    def _compare(self, config: dict[str, Any], digest: str, num_images: int, done: str) -> None:
        wrong = list(changes(config, self.config))
        if digest != self.source.digest and not wrong:
            now = len(self.source)
            said = f"{num_images} images then, {now} now" if now != num_images else "names, sizes or times"
            wrong.append(f"the source has changed ({said})")
        if wrong:
            raise refusal(self.folder, wrong, done)

    def report_file(self, number: int) -> Path:
        """Written when all else of a shard is."""
        return self.work / "shards" / f"{number:05d}.json"

    def read_report(self, number: int) -> ShardReport | None:
        """The report of a shard that is done; None where it is not, or something of it has gone."""
        try:
            text = self.report_file(number).read_text(encoding="utf-8")
            report = ShardReport.model_validate_json(text)
        except (FileNotFoundError, ValidationError):
            return None
        whole = all(
            path.is_file() and path.stat().st_size == entry.num_bytes
            for path, entry in ((self.folder / name, entry) for name, entry in report.files.items())
        )
        return report if whole else None

    def count_done(self) -> int:
        """Images whose shards are done."""
        done = (number for number in range(self.num_shards) if self.read_report(number) is not None)
        return sum(len(self.images(number)) for number in done)

    def reports(self) -> Iterator[ShardReport]:
        """The reports of all shards, in their order; for a job whose shards are all done."""
        for number in range(self.num_shards):
            report = self.read_report(number)
            if report is None:
                raise RuntimeError(f"{self.folder}: shard {number} has gone: type the same command again")
            yield report


def changes(before: dict[str, Any], config: PrepareConfig) -> Iterator[str]:
    """In what a configuration differs from the one that a folder was made by, key by key."""
    then, now = flatten(before), flatten(config.to_dict())
    for key in {**then, **now}:
        if key not in _FREE and then.get(key) != now.get(key):
            yield f"{key} was {shown(then.get(key))} and is {shown(now.get(key))}"


def refusal(folder: Path, wrong: Sequence[str], done: str) -> ValueError:
    """The error for a folder that was made or begun otherwise."""
    return ValueError(
        f"{folder} was {done} otherwise: {'; '.join(wrong)}. Choose another name (--set name=...), "
        "or remove the folder"
    )


def finished(folder: Path) -> Manifest | None:
    """The manifest of a folder that is complete; what is left of the work is removed.

    Raises:
        ValueError: there is a manifest that cannot be read, or files that it names are not there.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder)
    missing = manifest.missing_files(folder)
    if missing:
        raise ValueError(
            f"{folder} was prepared, but is damaged: {'; '.join(missing[:10])}"
            + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            + ". Remove the folder and prepare it again"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): remove {path.parents[1]} and begin anew"
        ) from error
    return state
