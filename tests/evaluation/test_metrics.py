"""Distances against their definitions, written out plainly, and against scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.evaluation.metrics import (
    covariance_root,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    statistics,
)


def _features(count: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) + shift


def _frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))


def test_statistics_are_numpys_mean_and_covariance() -> None:
    features = _features(30, 5, 0)
    mu, sigma = statistics(torch.from_numpy(features).float())
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-5)
    assert mu.dtype == sigma.dtype == np.float64


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), extra=st.integers(3, 60), seed=st.integers(0, 999), shift=st.floats(-5, 5))
def test_frechet_distance_is_that_of_scipys_square_root(
    size: int, extra: int, seed: int, shift: float
) -> None:
    a, b = _features(size + extra, size, seed), _features(size + 2 * extra, size, seed + 1, shift)
    if size == 1:
        a, b = np.column_stack([a, a[::-1]]), np.column_stack([b, b[::-1]])
    distance = frechet_distance(*statistics(a), *statistics(b))
    assert distance == pytest.approx(_frechet_by_sqrtm(a, b), rel=1e-6, abs=1e-6)
    assert distance == pytest.approx(frechet_distance(*statistics(b), *statistics(a)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(8, 200), (200, 8), (8, 12), (2, 2)])
def test_fewer_samples_than_features_are_no_trouble(first: int, second: int) -> None:
    a, b = _features(first, 40, 1), _features(second, 40, 2, 1.0)
    # The overlap as a sum of singular values, without any square root of a singular matrix.
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap
    assert frechet_distance(*statistics(a), *statistics(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [10, 40, 500])
def test_a_set_has_no_distance_to_itself(count: int) -> None:
    mu, sigma = statistics(_features(count, 40, 3))
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-6 * np.trace(sigma))


def test_frechet_distance_of_known_gaussians() -> None:
    # Commuting covariances: sum of (sqrt(a) - sqrt(b))^2.
    distance = frechet_distance([0, 3], np.diag([4.0, 9.0]), [4, 0], np.diag([1.0, 0.0]))
    assert distance == pytest.approx(25 + (2 - 1) ** 2 + 9)
    assert frechet_distance([0], [[0.0]], [2], [[0.0]]) == 4


def test_a_covariance_root_has_the_rows_of_its_rank() -> None:
    sigma = statistics(_features(10, 40, 0))[1]
    root = covariance_root(sigma)
    assert root.shape == (9, 40)
    np.testing.assert_allclose(root.T @ root, sigma, atol=1e-10 * np.trace(sigma))


def test_kernel_distance_of_whole_sets_is_the_unbiased_mmd() -> None:
    x, y = _features(12, 4, 0), _features(12, 4, 1, 0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    n = len(x)
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = sum(k(a, b) for a in x for b in y) / n**2
    # A subset of all samples is the set itself, whatever the order.
    assert kernel_distance(x, y, num_subsets=3) == pytest.approx(within - 2 * between)


def test_kernel_distance_is_seeded_unbiased_and_orders_shifts() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 400, 8))
    same = kernel_distance(x, y, subset_size=100)
    assert kernel_distance(x, y, subset_size=100) == same
    assert kernel_distance(x, y, subset_size=100, seed=1) != same
    # Two sets of one distribution: nothing but the sets' own luck, far below a small shift.
    assert 3 * abs(same) < kernel_distance(x, y + 0.5, subset_size=100) < kernel_distance(x, y + 1)


def test_kernel_distance_has_clean_fids_convention() -> None:
    from cleanfid.fid import kernel_distance as theirs

    x, y = _features(50, 6, 0), _features(50, 6, 1, 0.2)
    assert kernel_distance(x, y, num_subsets=1) == pytest.approx(theirs(x, y, num_subsets=1), rel=1e-9)


def test_inception_score_by_its_definition() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    scores = []
    for part in (p[:20], p[20:]):
        kl = [sum(q * np.log(q / m) for q, m in zip(row, part.mean(0), strict=True)) for row in part]
        scores.append(np.exp(np.mean(kl)))
    assert inception_score(p, num_splits=2) == pytest.approx(np.mean(scores))


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(np.eye(7).repeat(10, 0), 1) == pytest.approx(7)
    assert inception_score(np.full((70, 7), 1 / 7)) == pytest.approx(1)


def test_precision_and_recall_by_their_definition() -> None:
    real, fake = np.random.default_rng(1).standard_normal((2, 60, 3))
    fake = fake[:50] * 0.7 + 0.4

    def coverage(centres: np.ndarray, points: np.ndarray, k: int) -> float:
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        inside = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return float(np.mean(inside))

    for k in (1, 3):
        expected = coverage(real, fake, k), coverage(fake, real, k)
        assert precision_recall(real, fake, k) == expected
        assert 0 < expected[0] < 1


def test_precision_and_recall_at_the_ends() -> None:
    x = np.random.default_rng(0).standard_normal((40, 5))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    one_mode = np.concatenate([x, x + 100])
    assert precision_recall(one_mode, x) == (1, 0.5)
    repeated = np.repeat(x[:4], 5, axis=0)
    assert precision_recall(repeated, repeated[::-1]) == (1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics(np.ones((1, 3))), "features needs at least 2 samples; got 1"),
        (lambda: statistics(np.array([[1.0, np.nan], [0, 0]])), "not finite"),
        (lambda: statistics(np.ones(3)), "2 dimensions"),
        (lambda: kernel_distance(np.ones((4, 3)), np.ones((4, 2))), "real has 3 features and fake 2"),
        (lambda: kernel_distance(np.ones((4, 3)), np.ones((1, 3))), "fake needs at least 2"),
        (lambda: kernel_distance(np.ones((4, 3)), np.ones((4, 3)), num_subsets=0), "num_subsets 0"),
        (lambda: precision_recall(np.ones((3, 2)), np.ones((9, 2))), "num_neighbors"),
        (lambda: inception_score(np.ones((4, 3))), "does not sum to 1"),
        (lambda: inception_score(np.full((4, 2), 0.5)), "num_splits"),
        (lambda: frechet_distance([0], [[1.0]], [0, 0], np.eye(2)), "dimensions differ"),
        (lambda: frechet_distance([0, 0], [[1.0, 2.0], [0, 1]], [0, 0], np.eye(2)), "not symmetric"),
        (
            lambda: frechet_distance([0, 0], np.diag([1.0, -1.0]), [0, 0], np.eye(2)),
            "smallest eigenvalue is -1",
        ),
        (lambda: frechet_distance([np.inf, 0], np.eye(2), [0, 0], np.eye(2)), "mu1 has values that are not"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
