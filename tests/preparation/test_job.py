"""What goes on with a folder, what refuses to, and with what words."""

from pathlib import Path
from typing import Any

import pytest
from tiny_preparations import job_of, prepare_config, prepare_here, write_digits

from dtr_ray.data.manifest import Manifest
from dtr_ray.preparation.job import Job, finished
from dtr_ray.preparation.models import Models
from dtr_ray.preparation.shard import make_shard


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    write_digits(tmp_path / "digits", 130)
    return tmp_path / "digits"


@pytest.fixture
def begun(digits: Path, tmp_path: Path) -> Job:
    """A job whose first shard of three is done."""
    job = job_of(prepare_config(digits, tmp_path))
    job.begin()
    make_shard(job, Models.load(job.config, "cpu"), 0)
    return job


def test_the_shards_are_all_images_once(begun: Job) -> None:
    images = [index for number in range(begun.num_shards) for index in begun.images(number)]
    assert (begun.num_shards, images) == (3, list(range(130)))


def test_a_job_knows_what_is_done_and_goes_on(begun: Job) -> None:
    again = job_of(begun.config)
    again.begin()
    assert [again.read_report(number) is not None for number in range(3)] == [True, False, False]
    assert again.count_done() == 64


def test_a_shard_that_lost_a_file_is_not_done(begun: Job) -> None:
    (begun.folder / "pixels/00000.npy").unlink()
    assert begun.read_report(0) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 24}, "was begun otherwise: resolution was 16 and is 24"),
        ({"shard_images": 32}, "shard_images was 64 and is 32"),
        ({"num_classes": 1}, "num_classes was null and is 1"),
        ({"features": ["efficientnet_lite0"]}, "features was [] and is ['efficientnet_lite0']"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(
    begun: Job, tmp_path: Path, digits: Path, changes: dict[str, Any], words: str
) -> None:
    other = job_of(prepare_config(digits, tmp_path, **changes))
    with pytest.raises(ValueError, match="Choose another name") as caught:
        other.begin()
    assert words in str(caught.value)


def test_keys_that_change_nothing_of_the_result_may_change(begun: Job, tmp_path: Path, digits: Path) -> None:
    moved = digits.rename(tmp_path / "moved")
    other = job_of(prepare_config(moved, tmp_path, max_corrupt=3, num_workers=7))
    other.begin()
    assert other.read_report(0) is not None


def test_a_source_that_has_changed_is_refused(begun: Job, digits: Path) -> None:
    next(digits.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"the source has changed \(130 images then, 129 now\)"):
        job_of(begun.config).begin()


def test_images_of_other_content_are_another_source(begun: Job, digits: Path) -> None:
    one, two = sorted(digits.rglob("*.png"))[:2]
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=r"the source has changed \(names, sizes or times\)"):
        job_of(begun.config).begin()


def test_without_a_finished_shard_anything_may_change(digits: Path, tmp_path: Path) -> None:
    job_of(prepare_config(digits, tmp_path)).begin()
    other = job_of(prepare_config(digits, tmp_path, resolution=8))
    other.begin()
    make_shard(other, Models.load(other.config, "cpu"), 0)
    with pytest.raises(ValueError, match="resolution was 8"):
        job_of(prepare_config(digits, tmp_path)).begin()


def test_a_folder_with_other_things_is_left_alone(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty, and nothing that prepare began"):
        job_of(prepare_config(digits, tmp_path)).begin()


def test_a_finished_folder_is_known_and_damage_is_told(digits: Path, tmp_path: Path) -> None:
    config = prepare_config(digits, tmp_path)
    folder = tmp_path / "tiny"
    assert finished(folder) is None
    manifest = prepare_here(config)
    assert finished(folder) == manifest == Manifest.read(folder)
    assert not (folder / ".work").exists()
    job_of(config).check_finished(manifest)
    with pytest.raises(ValueError, match="was prepared otherwise: flip was true and is false"):
        job_of(prepare_config(digits, tmp_path, flip=False)).check_finished(manifest)
    (folder / "pixels/00002.npy").unlink()
    with pytest.raises(ValueError, match=r"is damaged: pixels/00002\.npy: No such file"):
        finished(folder)
