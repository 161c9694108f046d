"""Standard error and extrapolation: exact by leaving samples out one by one, and right in repetitions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from dtr_ray.config import DataConfig
from dtr_ray.data import load_images
from dtr_ray.evaluation.features import build_extractor
from dtr_ray.evaluation.metrics import covariance_root, frechet_distance, statistics
from dtr_ray.evaluation.references import Reference
from dtr_ray.evaluation.uncertainty import FrechetEstimate

Draw = Callable[[int, np.random.Generator], np.ndarray]


def reference_of(features: np.ndarray) -> Reference:
    mu, sigma = statistics(features)
    return Reference(mu, sigma, covariance_root(sigma), len(features))


def gaussians(size: int, decay: float = 1.0) -> tuple[Reference, Draw]:
    """A reference with a spectrum that decays like that of a network's features, and a model a little off."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, size + 1) ** -decay
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    sigma = (axes * spectrum) @ axes.T
    mixing = np.sqrt(spectrum * np.exp(0.3 * rng.normal(size=size)))[:, None] * axes.T
    shift = 0.3 * (np.sqrt(spectrum) * rng.normal(size=size)) @ axes.T
    reference = Reference(np.zeros(size), sigma, covariance_root(sigma), 10_000)
    return reference, lambda count, rng: rng.normal(size=(count, size)) @ mixing + shift


def repeated(reference: Reference, draw: Draw, count: int, repeats: int = 30) -> list[FrechetEstimate]:
    rng = np.random.default_rng(count)
    return [reference.frechet_estimate(draw(count, rng)) for _ in range(repeats)]


def spread_by_error(estimates: list[FrechetEstimate]) -> float:
    """The standard deviation of the distances, as a share of the errors that were reported of them."""
    spread = np.std([e.distance for e in estimates], ddof=1)
    return float(spread / np.mean([e.standard_error for e in estimates]))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    count=st.integers(3, 24),
    seed=st.integers(0, 999),
    decay=st.floats(0, 3),
    rounded=st.booleans(),
)
def test_it_is_what_leaving_out_each_sample_in_turn_gives(
    size: int, count: int, seed: int, decay: float, rounded: bool
) -> None:
    rng = np.random.default_rng(seed)
    scales = np.exp(-decay * np.arange(size) / size)
    real, fake = rng.normal(size=(30, size)) * scales, rng.normal(size=(count, size)) * scales + 0.3
    if rounded:
        # Samples that are alike, features that do not vary.
        fake = np.round(fake)
    reference = reference_of(real)
    estimate = reference.frechet_estimate(fake)
    without = np.array(
        [
            frechet_distance(reference.mu, reference.sigma, *statistics(np.delete(fake, i, 0)))
            for i in range(count)
        ]
    )
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    scale = 1e-5 * (np.trace(reference.sigma) + (fake**2).sum() / count)
    assert estimate.distance == pytest.approx(reference.frechet_distance_of(fake), rel=1e-9, abs=scale)
    assert estimate.leave_one_out == pytest.approx(without.mean(), rel=1e-5, abs=scale)
    assert estimate.standard_error == pytest.approx(error, rel=1e-3, abs=count * scale)
    if count > size:
        extrapolated = count * estimate.distance - (count - 1) * without.mean()
        assert estimate.infinity == pytest.approx(extrapolated, abs=count * scale)


@pytest.mark.parametrize("count", [20, 96, 1000])
def test_the_error_is_the_spread_of_repetitions_below_at_and_above_the_number_of_features(count: int) -> None:
    assert spread_by_error(repeated(*gaussians(96), count)) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("count", [30, 64, 400])
def test_the_error_is_the_spread_of_repetitions_with_real_images(count: int) -> None:
    pixels = load_digits().data

    def damaged(count: int, rng: np.random.Generator) -> np.ndarray:
        chosen = pixels[rng.integers(len(pixels), size=count)]
        return np.clip(chosen * rng.uniform(0.7, 1, (count, 1)) + rng.normal(size=chosen.shape), 0, 16)

    assert spread_by_error(repeated(reference_of(pixels), damaged, count)) == pytest.approx(1, abs=0.3)


def test_the_error_falls_as_the_root_of_the_number_of_samples() -> None:
    few, many = (repeated(*gaussians(16), count, repeats=5) for count in (1000, 4000))
    ratio = np.mean([e.standard_error for e in few]) / np.mean([e.standard_error for e in many])
    assert ratio == pytest.approx(2, rel=0.1)


def test_classes_that_come_in_turn_are_no_noise() -> None:
    # The classes differ by far more than the samples of one do.
    centres = 5 * np.random.default_rng(0).normal(size=(4, 6))
    reference = reference_of(np.random.default_rng(1).normal(size=(500, 6)) * [5, 4, 3, 2, 1, 1])
    labels = np.arange(200) % 4
    rng = np.random.default_rng(2)
    in_turn = [centres[labels] + rng.normal(size=(200, 6)) for _ in range(200)]
    spread = np.std([reference.frechet_distance_of(x) for x in in_turn], ddof=1)
    aware = np.mean([reference.frechet_estimate(x, torch.from_numpy(labels)).standard_error for x in in_turn])
    unaware = np.mean([reference.frechet_estimate(x).standard_error for x in in_turn])
    assert aware / spread == pytest.approx(1, abs=0.15)
    assert unaware / spread > 2
    # By chance, they are.
    by_chance = [centres[rng.integers(4, size=200)] + rng.normal(size=(200, 6)) for _ in range(200)]
    spread = np.std([reference.frechet_distance_of(x) for x in by_chance], ddof=1)
    unaware = np.mean([reference.frechet_estimate(x).standard_error for x in by_chance])
    assert unaware / spread == pytest.approx(1, abs=0.15)


def test_classes_of_one_sample_each_tell_nothing() -> None:
    reference, draw = gaussians(8)
    x = draw(40, np.random.default_rng(0))
    plain = reference.frechet_estimate(x).standard_error
    assert reference.frechet_estimate(x, np.arange(40)).standard_error == plain
    assert reference.frechet_estimate(x, np.zeros(40, np.int64)).standard_error == plain
    mixed = reference.frechet_estimate(x, np.arange(40) // 2 * (np.arange(40) < 10) + np.arange(40))
    assert np.isfinite(mixed.standard_error)


@pytest.mark.parametrize("count", [60, 100, 400])
def test_the_extrapolated_distance_is_nearer_to_the_one_of_many_samples(count: int) -> None:
    reference, draw = gaussians(48)
    many = reference.frechet_distance_of(draw(100_000, np.random.default_rng(0)))
    estimates = repeated(reference, draw, count)
    bias = np.mean([e.distance for e in estimates]) - many
    left = np.mean([e.infinity for e in estimates]) - many
    assert bias > 0
    assert abs(left) < (0.4 if count < 100 else 0.2) * bias


def test_it_extrapolates_as_subsets_of_many_sizes_do() -> None:
    reference, draw = gaussians(16)
    rng = np.random.default_rng(3)
    x = draw(600, rng)
    sizes = np.linspace(300, 600, 15).astype(int)
    distances = [
        np.mean([reference.frechet_distance_of(x[rng.permutation(600)[:size]]) for _ in range(40)])
        for size in sizes
    ]
    line = np.polyfit(1 / sizes, distances, 1)
    estimate = reference.frechet_estimate(x)
    assert estimate.infinity == pytest.approx(line[1], abs=0.1 * (estimate.distance - line[1]))


@pytest.mark.parametrize("count", [5, 40])
def test_it_is_the_same_however_the_features_come(count: int) -> None:
    reference, draw = gaussians(16)
    x = draw(count, np.random.default_rng(0)).astype(np.float32)
    first = reference.frechet_estimate(x)
    assert reference.frechet_estimate(x) == first
    assert reference.frechet_estimate(torch.from_numpy(x)) == first
    order = np.random.default_rng(1).permutation(count)
    shuffled = reference.frechet_estimate(x[order], order % 2)
    straight = reference.frechet_estimate(x, np.arange(count) % 2)
    assert shuffled.distance == pytest.approx(straight.distance, rel=1e-9)
    assert shuffled.standard_error == pytest.approx(straight.standard_error, rel=1e-6)


def test_what_cannot_be_estimated_is_refused() -> None:
    reference, draw = gaussians(6)
    x = draw(20, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 3 samples; got 2"):
        reference.frechet_estimate(x[:2])
    with pytest.raises(
        ValueError, match=r"strata has one value for each of the 20 samples; got shape \(19,\)"
    ):
        reference.frechet_estimate(x, np.zeros(19))
    with pytest.raises(ValueError, match=r"dimensions differ.* 5 features"):
        reference.frechet_estimate(x[:, :5])
    with pytest.raises(ValueError, match=r"dimensions differ.* 5 features"):
        reference.frechet_distance_of(x[:4, :5])
    with pytest.raises(ValueError, match="from more samples than the 6 features; got 6"):
        reference.frechet_estimate(x[:6]).infinity  # noqa: B018
    assert np.isfinite(reference.frechet_estimate(x[:7]).infinity)
    assert np.isfinite(reference.frechet_estimate(x[:3]).standard_error)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [200, 1280])
def test_the_error_is_the_spread_of_repetitions_with_the_quickstarts_features(
    count: int, shared_cache: Path
) -> None:
    data = load_images(DataConfig(name="mnist", resolution=16), shared_cache)
    extractor = build_extractor("efficientnet_lite0")
    generator = torch.Generator().manual_seed(count)

    def damaged() -> torch.Tensor:
        images = data.pixels(torch.randint(len(data), (count,), generator=generator)).float()
        blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
        share = torch.rand(count, 1, 1, 1, generator=generator)
        noise = 20 * torch.randn(images.shape, generator=generator)
        images = images * share + blurred * (1 - share) + noise
        return extractor(images.clamp(0, 255).round().to(torch.uint8))

    reference = reference_of(extractor(data.pixels(torch.arange(len(data)))).numpy())
    estimates = [reference.frechet_estimate(damaged()) for _ in range(30)]
    assert spread_by_error(estimates) == pytest.approx(1, abs=0.3)
