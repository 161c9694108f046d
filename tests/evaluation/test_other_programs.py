"""The metrics against other programs on the same features: clean-fid's and torchmetrics' own code.

Tolerances are relative to the terms whose difference the metric is: the traces of the covariances for the
Fréchet distance, the mean kernels for the kernel distance.
"""

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet
from cleanfid.fid import kernel_distance as cleanfid_kernel
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dtr_ray.evaluation.metrics import (
    covariance_root,
    frechet_distance,
    frechet_distance_of,
    frechet_distance_to,
    inception_score,
    kernel_distance,
    statistics,
)
from dtr_ray.evaluation.uncertainty import frechet_estimate

# clean-fid takes scipy's square root in a way that warns of singular matrices; torchmetrics warns that it
# keeps features.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::UserWarning"
)
CASES = range(60)


class Given(torch.nn.Module):
    """Takes features for images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def two_sets(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of two sets: correlated, of unlike scales; by turns more and fewer samples than features."""
    rng = np.random.default_rng([11, case])
    size = int(rng.integers(2, 25))
    counts = rng.integers(2, size + 2, 2) if case % 3 == 0 else rng.integers(size + 2, 4 * size + 8, 2)
    mixing = rng.normal(size=(size, size)) * np.exp(-rng.uniform(0, 3, size))
    real, fake = (rng.normal(size=(int(n), size)) @ mixing for n in counts)
    if case % 4 == 0:
        # As after a ReLU: not negative, and some features are never on.
        real, fake = (np.maximum(v, 0) * (np.arange(size) % 5 > 0) for v in (real, fake))
    return real, fake * rng.uniform(0.5, 1.5) + rng.normal(size=size) * rng.uniform(0, 1)


def by_torchmetrics(real: np.ndarray, fake: np.ndarray) -> float:
    metric = FrechetInceptionDistance(feature=Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    return float(metric.compute())


def by_singular_values(real: np.ndarray, fake: np.ndarray) -> float:
    """The definition: tr (S1 S2)^(1/2) is the sum of the singular values of Z1 Z2^T, scaled."""
    a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (real, fake))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap)


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance(case: int):
    real, fake = two_sets(case)
    (mu1, sigma1), (mu2, sigma2) = statistics(real), statistics(fake)
    root = covariance_root(sigma1)
    expected = pytest.approx(
        by_singular_values(real, fake), rel=1e-6, abs=1e-6 * (np.trace(sigma1) + np.trace(sigma2))
    )
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == expected
    assert frechet_distance_to(mu1, sigma1, root, mu2, sigma2) == expected
    assert frechet_distance_of(mu1, sigma1, root, fake) == expected
    if len(fake) > 2:
        assert frechet_estimate(mu1, sigma1, root, fake).distance == expected
    assert by_torchmetrics(real, fake) == expected
    assert cleanfid_frechet(mu1, sigma1, mu2, sigma2) == expected


@pytest.mark.parametrize("case", CASES)
def test_kernel_distance(case: int):
    real, fake = two_sets(case)
    size = min(len(real), len(fake))
    real, fake = real[:size], fake[:size]
    scale = max(float(((v @ v.T / v.shape[1] + 1) ** 3).mean()) for v in (real, fake))
    # One subset of all samples: what is drawn at random is their order alone.
    found = pytest.approx(kernel_distance(real, fake, num_subsets=1), rel=1e-6, abs=1e-6 * scale)
    assert cleanfid_kernel(real, fake, num_subsets=1, max_subset_size=size) == found
    metric = KernelInceptionDistance(feature=Given(real.shape[1]), subsets=1, subset_size=size)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    assert float(metric.compute()[0]) == found


@pytest.mark.parametrize("case", CASES)
def test_inception_score(case: int):
    rng = np.random.default_rng([12, case])
    splits = int(rng.integers(2, 6))
    logits = torch.from_numpy(rng.normal(size=(splits * int(rng.integers(2, 20)), 7)) * rng.uniform(0.1, 6))
    metric = InceptionScore(feature=Given(7), splits=splits).set_dtype(torch.float64)
    metric.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(case)
        order = torch.randperm(len(logits))
        torch.manual_seed(case)
        theirs = float(metric.compute()[0])
    assert inception_score(logits[order].softmax(1), splits) == pytest.approx(theirs, rel=1e-9)


def test_a_set_and_itself_and_constant_features():
    rng = np.random.default_rng(0)
    for count, size in ((30, 6), (5, 6)):
        x = rng.normal(size=(count, size)) + 3
        (mu, sigma), constant = statistics(x), np.full((count, size), 2.5)
        root, scale = covariance_root(sigma), np.trace(sigma)
        assert frechet_distance_of(mu, sigma, root, x) == pytest.approx(0, abs=1e-6 * scale)
        assert frechet_estimate(mu, sigma, root, x).distance == pytest.approx(0, abs=1e-6 * scale)
        # Samples at one point have its distance to the mean and all of the reference's variance.
        expected = float(((mu - 2.5) ** 2).sum() + scale)
        assert frechet_distance_of(mu, sigma, root, constant) == pytest.approx(expected, rel=1e-9)
        assert by_torchmetrics(x, constant) == pytest.approx(expected, rel=1e-9)
        estimate = frechet_estimate(mu, sigma, root, constant)
        assert (estimate.distance, estimate.standard_error) == (pytest.approx(expected), pytest.approx(0))
        # A reference at one point.
        nothing = statistics(constant)
        none = covariance_root(nothing[1])
        assert none.shape == (0, size)
        assert frechet_distance_of(*nothing, none, x) == pytest.approx(expected, rel=1e-9)
        assert frechet_estimate(*nothing, none, x).distance == pytest.approx(expected, rel=1e-9)
        assert frechet_distance_of(*nothing, none, constant) == 0


def test_one_sample_has_no_distance():
    real = np.random.default_rng(0).normal(size=(9, 3))
    mu, sigma = statistics(real)
    one = real[:1]
    for measure in (
        lambda: statistics(one),
        lambda: frechet_distance_of(mu, sigma, covariance_root(sigma), one),
        lambda: kernel_distance(real, one),
        lambda: inception_score(np.ones((1, 1)), 1),
    ):
        with pytest.raises(ValueError, match="needs at least 2 samples; got 1"):
            measure()
