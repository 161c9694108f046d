"""Affinity files: written whole, read back, and refused by name where they are none."""

from pathlib import Path

import numpy as np
import pytest

from dtr_ray.config.trial import DiffusionConfig
from dtr_ray.config.weighting import AffinityIntervals, NashWeighting, SNRIntervals, UWWeighting
from dtr_ray.diffusion.affinity import Affinity, load_affinity
from dtr_ray.diffusion.intervals import (
    affinity_intervals,
    build_intervals,
    check_intervals,
    measured_intervals,
    snr_intervals,
    uniform_intervals,
)
from dtr_ray.diffusion.noise import noise_schedule

COSINE = noise_schedule("cosine", 100)


def blocks(*sizes: int) -> np.ndarray:
    """Timesteps that agree within a block and not beyond."""
    member = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(member[:, None] == member, 1.0, -0.5)


def affinity_of(timesteps, num_timesteps: int = 100, matrix=None) -> Affinity:
    timesteps = np.array(timesteps)
    return Affinity(np.eye(len(timesteps)) if matrix is None else matrix, timesteps, num_timesteps)


def weighting(path: Path, num_clusters: int = 3) -> UWWeighting:
    return UWWeighting(num_clusters=num_clusters, intervals=AffinityIntervals(**{"from": str(path)}))


def test_a_file_gives_back_what_was_written(tmp_path: Path):
    path = tmp_path / "new" / "a.npz"
    written = Affinity(blocks(2, 1), np.array([0, 5, 9]), 10, {"identity": "x", "settings": {"seed": 1}})
    written.save(path)
    found = load_affinity(path)
    assert found.source == written.source
    assert found.num_timesteps == 10
    np.testing.assert_array_equal(found.matrix, written.matrix)
    np.testing.assert_array_equal(found.timesteps, written.timesteps)
    assert (found.matrix.dtype, found.timesteps.dtype) == (np.float64, np.int64)
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.npz"
    affinity_of([0, 9], 10).save(path)
    before = path.read_bytes()

    def full(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        affinity_of([0, 5, 9], 10).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_of_all_timesteps_the_intervals_are_those_of_the_matrix():
    matrix = np.random.default_rng(0).uniform(-1, 1, (30, 30))
    affinity = affinity_of(range(30), 30, matrix)
    for clusters in (1, 4, 30):
        assert measured_intervals(affinity, clusters) == affinity_intervals(matrix, clusters)


def test_intervals_meet_half_way_between_measured_timesteps():
    affinity = affinity_of([0, 10, 25, 40, 99], 100, blocks(2, 2, 1))
    # 17.5 is between 17 and 18; 69.5 between 69 and 70.
    assert measured_intervals(affinity, 3) == [(0, 18), (18, 70), (70, 100)]
    # Half-way is 20 itself, which goes to the later.
    assert measured_intervals(affinity_of([10, 30], 100), 2) == [(0, 20), (20, 100)]
    assert measured_intervals(affinity_of([4, 5], 100), 2) == [(0, 5), (5, 100)]


def test_a_configuration_gets_the_intervals_that_it_names(tmp_path: Path):
    assert build_intervals(UWWeighting(num_clusters=4), COSINE) == uniform_intervals(100, 4)
    snr = NashWeighting(num_clusters=5, intervals=SNRIntervals())
    assert build_intervals(snr, COSINE) == snr_intervals(COSINE.snr, 5)
    affinity_of([0, 10, 25, 40, 99], 100, blocks(2, 2, 1)).save(tmp_path / "a.npz")
    assert build_intervals(weighting(tmp_path / "a.npz"), COSINE) == [(0, 18), (18, 70), (70, 100)]


def test_a_relative_path_and_a_home_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    affinity_of([0, 50, 99], 100).save(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = build_intervals(weighting(Path("a.npz")), COSINE)
    assert found == build_intervals(weighting(Path("~/a.npz")), COSINE)


def not_npz(path: Path) -> None:
    path.write_text("hello", encoding="utf-8")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lone_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.eye(3))


def torn(path: Path) -> None:
    affinity_of(range(20), 20).save(path)
    path.write_bytes(path.read_bytes()[:-60])


def damaged(path: Path) -> None:
    affinity_of(range(100), 100, np.random.default_rng(0).uniform(-1, 1, (100, 100))).save(path)
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(content)


def folder(path: Path) -> None:
    path.mkdir()


def arrays(**values: object):
    good = {"affinity": np.eye(3), "timesteps": np.array([0, 5, 9]), "num_timesteps": np.int64(100)}

    def write(path: Path) -> None:
        kept = {name: value for name, value in (good | values).items() if value is not None}
        np.savez(path, **kept)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist: python -m dtr_ray.analyze affinity"),
        (not_npz, "is no affinity file"),
        (empty, "is no affinity file"),
        (lone_array, "is no affinity file"),
        (torn, "is no affinity file"),
        (damaged, "is no affinity file"),
        (folder, "is no affinity file"),
        (arrays(affinity=None), "it has no array affinity"),
        (arrays(timesteps=None, num_timesteps=None), "it has no array timesteps, num_timesteps"),
        (arrays(affinity=np.eye(4)), r"affinity is float64 \(4, 4\)"),
        (arrays(affinity=np.eye(3, dtype=int)), r"affinity is int64 \(3, 3\)"),
        (arrays(affinity=np.full((3, 3), np.nan)), "not finite"),
        (arrays(affinity=2 * np.eye(3)), "affinity has the value 2"),
        (arrays(timesteps=np.array([0, 9, 5])), r"must ascend in \[0, 100\)"),
        (arrays(timesteps=np.array([0, 5, 100])), r"must ascend in \[0, 100\)"),
        (arrays(timesteps=np.array([-1, 5, 9])), r"must ascend in \[0, 100\)"),
        (arrays(timesteps=np.array([0.0, 5.0, 9.0])), r"timesteps is float64 \(3,\)"),
        (arrays(affinity=np.zeros((0, 0)), timesteps=np.zeros(0, int)), "timesteps is int64"),
        (arrays(num_timesteps=np.int64(0)), "num_timesteps is 0"),
        (arrays(num_timesteps=np.array([100, 100])), "num_timesteps is"),
        (arrays(source=np.array("{")), "is no affinity file"),
        (arrays(num_timesteps=np.int64(50)), "is of 50 timesteps, but diffusion.num_timesteps is 100"),
    ],
)
def test_a_file_that_does_not_serve_is_named_with_its_key(write, message: str, tmp_path: Path):
    path = tmp_path / "a.npz"
    write(path)
    for build in (
        lambda: build_intervals(weighting(path), COSINE),
        lambda: check_intervals(weighting(path), DiffusionConfig(num_timesteps=100)),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            build()
        assert str(raised.value).startswith(f"weighting.intervals.from: '{path}' ")


def test_more_clusters_than_were_measured_are_refused(tmp_path: Path):
    affinity_of([0, 50, 99], 100).save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"weighting.num_clusters is 4: .* the 3 timesteps .*a.npz"):
        build_intervals(weighting(tmp_path / "a.npz", 4), COSINE)


def test_what_needs_no_file_is_not_checked():
    check_intervals(UWWeighting(intervals=SNRIntervals()), DiffusionConfig(num_timesteps=2))
