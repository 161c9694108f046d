"""A preparation on Ray's workers: as without them, over lost workers, too many corrupt images, and again."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from ray import cloudpickle
from rich.console import Console
from tiny_clip import CHANNELS, write_clip
from tiny_preparations import job_of, prepare_config, prepare_here, write_digits
from tiny_sweeps import snapshot

from dtr_ray.data.manifest import Manifest
from dtr_ray.preparation.estimate import Probe
from dtr_ray.preparation.job import Job, TooManyCorruptError
from dtr_ray.service.cluster import Node
from dtr_ray.service.preparing import run_preparation
from dtr_ray.service.shard_progress import ShardProgress
from dtr_ray.service.shard_worker import Workers
from dtr_ray.sources.listing import Item, Source

# Workers cannot import a test's module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Deadly(Source):
    """A source that kills the process that reads from it, once, when another shard is done."""

    def __init__(self, job: Job, mark: Path) -> None:
        vars(self).update(vars(job.source))
        self._source = job.source
        self._mark = mark
        self._shards = job.work / "shards"
        self._num_before = len(list(self._shards.iterdir()))

    def read(self, index: int) -> Item:
        if len(list(self._shards.glob("*.json"))) > self._num_before and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), 9)
        return self._source.read(index)


class Plans:
    """Remembers what a plan was shown with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Probe, int, Workers]] = []

    def __call__(self, probed: Probe, done: int, workers: Workers) -> None:
        self.calls.append((probed, done, workers))


def test_workers_make_what_one_process_makes_and_a_second_run_nothing(
    ray_cluster: str, tmp_path: Path
) -> None:
    write_digits(tmp_path / "digits", 200, num_corrupt=3, captions=True)
    clip = write_clip(tmp_path / "clip")
    changes = {"text_encoder": str(clip), "text_channels": CHANNELS, "shard_images": 30}
    expected = prepare_here(prepare_config(tmp_path / "digits", tmp_path / "alone", **changes))
    config, plans = prepare_config(tmp_path / "digits", tmp_path / "ray", **changes), Plans()
    job = job_of(config)
    found = run_preparation(job, plans)
    assert found.files == expected.files
    assert found.model_copy(update={"config": {}}) == expected.model_copy(update={"config": {}})
    ((probed, done, workers),) = plans.calls
    assert (done, workers) == (0, Workers(2, "cpu", 1))
    assert probed.image_s > 0
    assert probed.captions_per_image == pytest.approx(2.0)
    before = snapshot(job.folder)
    assert run_preparation(job, plans) == found
    assert len(plans.calls) == 1
    assert snapshot(job.folder) == before
    assert Manifest.read(job.folder).broken_files(job.folder) == []


@pytest.mark.slow
def test_a_worker_that_is_lost_is_made_up_for_and_corrupt_images_stop_the_work(
    ray_cluster: str, tmp_path: Path
) -> None:
    corrupt = write_digits(tmp_path / "digits", 160, num_corrupt=8)
    job = job_of(prepare_config(tmp_path / "digits", tmp_path, shard_images=20, max_corrupt=5, num_workers=1))
    with pytest.raises(TooManyCorruptError) as caught:
        run_preparation(job, Plans())
    named = [image.name for image in caught.value.skipped]
    assert len(named) == len(set(named)) > 5
    assert set(named) <= set(corrupt)
    kept = {path: path.stat().st_mtime_ns for path in (job.work / "shards").glob("*.json")}
    assert len(kept) >= 3
    # The limit counts what was skipped before, too: nothing is started for a run that cannot end well.
    lower = job_of(job.config.model_copy(update={"max_corrupt": 0}))
    with pytest.raises(TooManyCorruptError, match="more than max_corrupt 0"):
        run_preparation(lower, Plans())
    more = job_of(job.config.model_copy(update={"max_corrupt": 8}))
    plans = Plans()
    manifest = run_preparation(replace(more, source=Deadly(more, tmp_path / "mark")), plans)
    assert (tmp_path / "mark").exists()
    assert (manifest.num_images, sorted(image.name for image in manifest.skipped)) == (160, corrupt)
    assert plans.calls[0][1] == 20 * len(kept)


def test_a_folder_that_another_process_works_in_is_refused(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 20)
    job = job_of(prepare_config(tmp_path / "digits", tmp_path))
    job.work.mkdir(parents=True)
    with FileLock(job.work / ".lock"), pytest.raises(ValueError, match="another process prepares"):
        run_preparation(job, Plans())


@pytest.mark.parametrize(
    ("machines", "num_workers", "expected"),
    [
        ([Node(8, 0)], None, Workers(8, "cpu", 1)),
        ([Node(8, 0)], 3, Workers(3, "cpu", 1)),
        ([Node(8, 0), Node(4, 0)], 100, Workers(12, "cpu", 1)),
        ([Node(96, 8), Node(96, 8)], None, Workers(16, "cuda", 12)),
        ([Node(128, 1)], None, Workers(1, "cuda", 16)),
    ],
)
def test_there_is_a_worker_for_each_gpu_or_else_for_each_core(
    machines: list[Node], num_workers: int | None, expected: Workers, tmp_path: Path
) -> None:
    config = prepare_config(tmp_path, tmp_path, num_workers=num_workers)
    assert Workers.fitting(config, machines) == expected


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr("dtr_ray.service.shard_progress.time.monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_without_a_terminal_progress_is_a_line_now_and_then(clock: Callable[[float], None]) -> None:
    console = Console(file=io.StringIO(), width=100)
    with ShardProgress("images", 1000, 100, console) as progress:
        for done in range(110, 1001, 10):
            clock(1.0)
            progress.update(done, "3 corrupt" if done > 500 else "")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "[0:15] 250 of 1,000 images, 10 images/s, 1:15 left"
    assert lines[-1] == "[1:30] 1,000 of 1,000 images, 10 images/s"
    assert len(lines) == 7


def test_on_a_terminal_progress_is_a_bar(wide: Console, clock: Callable[[float], None]) -> None:
    with ShardProgress("images", 1000, 0, wide) as progress:
        clock(2.0)
        progress.update(500, "1 corrupt")
    text = wide.file.getvalue()
    assert "500/1,000" in text
    assert "250 images/s, 0:02 left, 1 corrupt" in text


def test_a_job_is_small_enough_to_be_sent(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 50)
    job = job_of(prepare_config(tmp_path / "digits", tmp_path))
    sent: Job = cloudpickle.loads(cloudpickle.dumps(job))
    assert sent.source.read(3) == job.source.read(3)
