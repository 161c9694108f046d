"""Reference statistics: right, computed once, keyed by what they depend on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.evaluation import references
from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.metrics import frechet_distance, statistics
from dtr_ray.evaluation.references import reference_features, reference_statistics


class Pooled(Extractor):
    """Sixteen mean brightnesses; counts the images it has seen."""

    name = "pooled"
    num_features = 16
    num_classes = 16
    _chunk_images = 100

    def __init__(self) -> None:
        super().__init__("cpu")
        self.seen = 0

    def _features(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)[:, 0].flatten(1) + 1000

    def _logits(self, features: Tensor) -> Tensor:
        return features - 1000


@pytest.fixture(scope="module")
def digits(shared_cache: Path) -> ImageData:
    return load_images(DataConfig(name="digits", resolution=8), shared_cache)


def test_they_are_the_statistics_of_all_images(digits: ImageData, tmp_path: Path) -> None:
    extractor = Pooled()
    reference = reference_statistics(digits, extractor, tmp_path, batch_size=250)
    features = extractor(digits.pixels(torch.arange(len(digits))))
    mu, sigma = statistics(features)
    np.testing.assert_allclose(reference.mu, mu, rtol=1e-12)
    np.testing.assert_allclose(reference.sigma, sigma, rtol=1e-9, atol=1e-9 * np.trace(sigma))
    assert reference.num_images == 1797
    other = statistics(features[:100] * 1.1)
    assert reference.frechet_distance(*other) == pytest.approx(frechet_distance(mu, sigma, *other), rel=1e-9)
    assert reference.frechet_distance(mu, sigma) == pytest.approx(0, abs=1e-6 * np.trace(sigma))


def test_a_second_call_reads_the_file(digits: ImageData, tmp_path: Path) -> None:
    first = reference_statistics(digits, Pooled(), tmp_path)
    extractor = Pooled()
    second = reference_statistics(digits, extractor, tmp_path)
    assert extractor.seen == 0
    assert np.array_equal(first.sigma, second.sigma)
    assert np.array_equal(first.root, second.root)


def test_another_data_set_has_a_file_of_its_own(
    digits: ImageData, tmp_path: Path, shared_cache: Path
) -> None:
    reference_statistics(digits, Pooled(), tmp_path)
    larger = load_images(DataConfig(name="digits", resolution=16), shared_cache)
    reference_statistics(larger, Pooled(), tmp_path)
    assert len(list(tmp_path.glob("reference-*.npz"))) == 2


def test_one_image_has_no_statistics(tmp_path: Path) -> None:
    one = ImageData(np.zeros((1, 1, 8, 8), np.uint8), torch.zeros(1, dtype=torch.int64), 1, "one")
    for reference in (reference_statistics, reference_features):
        with pytest.raises(ValueError, match="at least 2 images"):
            reference(one, Pooled(), tmp_path)


def test_features_are_those_of_all_images_once_and_in_another_order(
    digits: ImageData, tmp_path: Path
) -> None:
    extractor = Pooled()
    kept = reference_features(digits, extractor, tmp_path)
    assert extractor.seen == len(digits)
    expected = extractor(digits.pixels(torch.arange(len(digits)))).numpy()
    assert (kept.shape, kept.dtype) == (expected.shape, np.float32)
    assert not np.array_equal(kept, expected)
    assert np.array_equal(np.unique(kept, axis=0), np.unique(expected, axis=0))
    again = Pooled()
    assert np.array_equal(reference_features(digits, again, tmp_path), kept)
    assert again.seen == 0
    assert isinstance(kept, np.memmap)


def test_no_more_features_are_kept_than_the_bound(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = reference_features(digits, Pooled(), tmp_path)
    monkeypatch.setattr(references, "MAX_FEATURES", 500)
    extractor = Pooled()
    some = reference_features(digits, extractor, tmp_path, batch_size=99)
    assert extractor.seen == len(some) == 500
    assert np.array_equal(some, everything[:500])
    # Statistics are of all images nonetheless.
    reference = reference_statistics(digits, extractor, tmp_path, features=some)
    assert reference.num_images == len(digits)
    assert extractor.seen == 500 + len(digits)


def test_statistics_of_known_features_look_at_no_image_again(digits: ImageData, tmp_path: Path) -> None:
    extractor = Pooled()
    kept = reference_features(digits, extractor, tmp_path / "a")
    extractor.seen = 0
    fast = reference_statistics(digits, extractor, tmp_path / "a", features=kept)
    assert extractor.seen == 0
    slow = reference_statistics(digits, extractor, tmp_path / "b")
    np.testing.assert_allclose(fast.mu, slow.mu, rtol=1e-12)
    np.testing.assert_allclose(fast.sigma, slow.sigma, rtol=1e-9, atol=1e-9 * np.trace(slow.sigma))
