"""The plan: disk as it is written, time by what a few images took, and a refusal where there is no room."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prepared_folders import save_vae
from tiny_clip import CHANNELS, write_clip
from tiny_preparations import job_of, prepare_config, write_digits

from dtr_ray.config import PrepareConfig
from dtr_ray.preparation import estimate as module
from dtr_ray.preparation import finish as finishing
from dtr_ray.preparation.estimate import Probe, disk_need, estimate, probe, size_text
from dtr_ray.preparation.job import Job
from dtr_ray.preparation.models import Models, keep_digests
from dtr_ray.preparation.plan import duration_text, plan_text
from dtr_ray.preparation.shard import make_shard
from dtr_ray.preparation.tokens import Tokens


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 300)
    for number, path in enumerate(folder.rglob("*.png")):
        path.with_suffix(".txt").write_text(f"picture {number}")
    return folder


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _all_shards(job: Job, models: Models) -> None:
    job.begin()
    keep_digests(job, models.digests())
    for number in range(job.num_shards):
        make_shard(job, models, number)


@pytest.mark.parametrize("kind", ["pixels and features", "latents and captions"])
def test_the_disk_figure_is_what_is_written(digits: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"resolution": 32, "shard_images": 150}
    if kind == "pixels and features":
        changes |= {"features": ["efficientnet_lite0"]}
    else:
        clip, vae = write_clip(tmp_path / "clip"), save_vae(tmp_path / "vae")
        changes |= {"vae": str(vae), "text_encoder": str(clip), "text_channels": CHANNELS}
    config = prepare_config(digits, tmp_path, **changes)
    job, models = job_of(config), Models.load(config, "cpu")
    need = disk_need(config, 300, probe(job, models))
    _all_shards(job, models)
    found = finishing.gather(job)
    if models.text_encoder is not None:
        tokens = Tokens(job, found.texts)
        for number in range(tokens.num_chunks):
            tokens.write(number, models.text_encoder.encode(tokens.chunk(number)).numpy())
        tokens.close()
    before = _bytes(job.folder)
    finishing.finish(job, found)
    kept = _bytes(job.folder)
    assert need.kept == pytest.approx(kept, rel=0.02)
    if kind == "pixels and features":
        assert before == pytest.approx(300 * (3 * 32 * 32) + need.working, rel=0.03)


def _published(num_images: int, **changes: Any) -> tuple[PrepareConfig, int]:
    values = {"name": "x", "source": {"type": "folder", "path": "x"}, "vae": "some/vae", **changes}
    return PrepareConfig.from_dict(values), num_images


@pytest.mark.parametrize(
    ("config", "num_images", "gigabytes"),
    [
        # 70,000 x 2 orientations x (mean, std) x 4 x 32 x 32 x 4 bytes; 50,000 x 2048 x 4 of features.
        (*_published(70_000), 4.588 + 0.410 + 0.067),
        (*_published(1_281_167), 83.963 + 0.410 + 0.067 + 0.010),
        (*_published(1_281_167, latent_dtype="float16", flip=False), 20.991 + 0.410 + 0.067 + 0.010),
        # 70,000 x 3 x 256 x 256 bytes.
        (*_published(70_000, vae=None), 13.763 + 0.410 + 0.067),
    ],
)
def test_the_disk_figure_at_the_size_of_ffhq_and_imagenet(
    config: PrepareConfig, num_images: int, gigabytes: float
) -> None:
    need = disk_need(config, num_images, Probe(1, 1.0))
    assert need.kept / 1e9 == pytest.approx(gigabytes, rel=0.001)
    assert need.working / 1e9 == pytest.approx(num_images * (2048 * 4 + 40) / 1e9, rel=0.001)


def test_the_disk_figure_of_coco_with_its_captions() -> None:
    config, num_images = _published(82_783, text_encoder="some/clip")
    need = disk_need(config, num_images, Probe(1, 1.0, 5.0, 0.1, 52.0))
    assert need.kept / 1e9 == pytest.approx(5.425 + 82_783 * 5 * 77 * 768 * 2 / 1e9 + 0.48, rel=0.002)


def test_time_is_that_of_the_images_left_over_all_workers(digits: Path, tmp_path: Path) -> None:
    job = job_of(prepare_config(digits, tmp_path, shard_images=50))
    probed = Probe(16, 0.5)
    assert estimate(job, probed, 0, 4).seconds == pytest.approx(300 * 0.5 / 4)
    assert estimate(job, probed, 200, 4).seconds == pytest.approx(100 * 0.5 / 2)
    assert estimate(job, replace(probed, captions_per_image=2, caption_s=0.1), 300, 4).seconds == (
        pytest.approx(300 * 2 * 0.1 / 4)
    )


def test_a_probe_measures_what_the_work_takes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENOUGH_S", 0.3)
    config = prepare_config(digits, tmp_path, shard_images=100, resolution=128)
    job, models = job_of(config), Models.load(config, "cpu")
    ratios = []
    for _ in range(3):
        found = probe(job, models)
        started = time.monotonic()
        make_shard(job, models, 0)
        ratios.append(found.image_s * 100 / (time.monotonic() - started))
    # Other work on the machine comes and goes.
    assert 0.3 < sorted(ratios)[1] < 3


def test_a_disk_without_room_is_refused_before_the_work(digits: Path, tmp_path: Path) -> None:
    job = job_of(prepare_config(digits, tmp_path))
    found = estimate(job, Probe(1, 1.0), 0, 1)
    found.check(job.folder)
    with pytest.raises(ValueError, match=r"tiny needs 24. kB more, but its disk has 1 kB free"):
        replace(found, free=1000).check(job.folder)


def test_the_plan_says_it_all(digits: Path, tmp_path: Path) -> None:
    job = job_of(prepare_config(digits, tmp_path))
    text = plan_text(job, Probe(16, 0.5), estimate(job, Probe(16, 0.5), 128, 2), "2, one a CPU core")
    assert "tiny: 300 images of source folder, 16 x 16, 10 classes" in text
    assert "5 of at most 64 images, 128 images done before" in text
    assert "about 43 s (500 ms an image, measured on 16)" in text
    assert "free" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0032, "3.2 ms"), (12, "12 s"), (89, "89 s"), (300, "5 min"), (7200, "2 h"), (200_000, "2.3 days")],
)
def test_durations_are_told_in_two_digits(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (84_000_000_000, "84 GB"), (999_700, "1 MB"), (1.25e12, "1.25 TB")]
)
def test_sizes_are_told_in_three_digits(size: float, text: str) -> None:
    assert size_text(size) == text
