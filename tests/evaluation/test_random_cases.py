"""Kernel distance, precision and recall, and Inception score against plain loops, over random cases."""

import itertools
import math

import numpy as np
import pytest
import torch

from dtr_ray.evaluation import frechet, neighbours
from dtr_ray.evaluation.metrics import inception_score, kernel_distance, precision_recall, statistics


def random_sets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two small sets; in a third of the cases of whole numbers, so that distances tie and rows repeat."""
    rng = np.random.default_rng([7, seed])
    size = int(rng.integers(1, 9))
    real, fake = (rng.normal(size=(int(rng.integers(6, 30)), size)) for _ in range(2))
    fake = fake * rng.uniform(0.3, 2) + rng.normal(size=size) * rng.uniform(0, 2)
    if seed % 3 == 0:
        real, fake = np.round(2 * real), np.round(2 * fake)
    offset = 10.0 ** rng.integers(0, 4)
    return real + offset, fake + offset


def kernel_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of two sets: three averages of the kernel."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(points: np.ndarray) -> float:
        pairs = list(itertools.permutations(points, 2))
        return math.fsum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = math.fsum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def coverage_by_loops(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of points in some ball around a centre that reaches its k-th nearest other centre."""
    balls = []
    for i, centre in enumerate(centres):
        others = sorted(((centre - o) ** 2).sum() for j, o in enumerate(centres) if j != i)
        balls.append((centre, others[k - 1]))
    inside = 0
    for point in points:
        inside += any(((point - centre) ** 2).sum() <= squared for centre, squared in balls)
    return inside / len(points)


def score_by_loops(probabilities: np.ndarray, num_splits: int) -> float:
    scores, start = [], 0
    for part in range(num_splits):
        # The first parts are one longer where the samples do not divide evenly.
        count = len(probabilities) // num_splits + (part < len(probabilities) % num_splits)
        rows = probabilities[start : start + count]
        start += count
        marginal = [sum(row[c] for row in rows) / count for c in range(rows.shape[1])]
        divergences = [
            sum(p * math.log(p / m) for p, m in zip(row, marginal, strict=True) if p > 0) for row in rows
        ]
        scores.append(math.exp(sum(divergences) / count))
    return sum(scores) / num_splits


@pytest.mark.parametrize("seed", range(52))
def test_kernel_distance(seed: int):
    x, y = random_sets(seed)
    x, y = x[: min(len(x), len(y))], y[: min(len(x), len(y))]
    # A subset of all is the set, so every subset gives the distance of the whole.
    expected = kernel_by_loops(x, y)
    scale = float(((x**2).mean() + 1) ** 3)
    assert kernel_distance(x, y, num_subsets=2, seed=seed) == pytest.approx(
        expected, rel=1e-9, abs=1e-9 * scale
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_subsets_average_to_the_distance_of_the_whole(seed: int):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(25, 3)), rng.normal(size=(18, 3)) + 0.5
    subsets = [kernel_distance(x, y, num_subsets=1, subset_size=5, seed=s) for s in range(1500)]
    error = np.std(subsets) / np.sqrt(len(subsets))
    assert abs(np.mean(subsets) - kernel_by_loops(x, y)) < 4 * error


@pytest.mark.parametrize("block_rows", [2048, 4])
@pytest.mark.parametrize("seed", range(52))
def test_precision_and_recall(seed: int, block_rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", block_rows)
    x, y = random_sets(seed)
    k = seed % 5 + 1
    assert precision_recall(x, y, k) == (coverage_by_loops(x, y, k), coverage_by_loops(y, x, k))


@pytest.mark.parametrize("seed", range(52))
def test_inception_score(seed: int):
    rng = np.random.default_rng([8, seed])
    count, classes = int(rng.integers(2, 60)), int(rng.integers(1, 12))
    p = rng.dirichlet(np.full(classes, rng.uniform(0.05, 2)), count)
    # Classes that are never seen, and samples that are sure.
    p[rng.uniform(size=p.shape) < 0.2] = 0
    p[p.sum(1) == 0, 0] = 1
    p /= p.sum(1, keepdims=True)
    splits = int(rng.integers(1, min(count, 10) + 1))
    assert inception_score(p, splits) == pytest.approx(score_by_loops(p, splits), rel=1e-12)


@pytest.mark.parametrize("block_rows", [5, 2048])
def test_statistics_do_not_depend_on_the_blocks(block_rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", block_rows)
    x = np.random.default_rng(0).normal(size=(33, 6)) + 1000
    mu, sigma = statistics(x)
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-9)


def test_float32_features_are_measured_as_exactly_as_their_float64_copies():
    x, y = (v.astype(np.float32) for v in random_sets(1))
    for metric in (kernel_distance, precision_recall):
        expected = metric(x.astype(np.float64), y.astype(np.float64))
        assert metric(x, y) == expected
        assert metric(torch.from_numpy(x), torch.from_numpy(y)) == expected
    for found, expected in zip(statistics(x), statistics(x.astype(np.float64)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_a_set_and_itself():
    x, _ = random_sets(2)
    assert precision_recall(x, x) == (1, 1)
    # Not 0: the two are the same sample, not two samples of the same distribution.
    assert kernel_distance(x, x, num_subsets=1) == pytest.approx(kernel_by_loops(x, x))


def test_constant_features():
    constant = np.full((9, 4), 2.5)
    assert kernel_distance(constant, constant) == 0
    assert precision_recall(constant, constant) == (1, 1)
    assert precision_recall(constant, constant + 1e-3) == (0, 0)
    # Balls around one point and its copies have no extent.
    spread = np.random.default_rng(0).normal(size=(9, 4))
    assert precision_recall(constant, spread)[0] == 0
    assert inception_score(np.full((12, 5), 0.2)) == 1


def test_as_few_samples_as_there_can_be():
    x, y = random_sets(3)
    assert precision_recall(x[:4], y[:4], 3) == (
        coverage_by_loops(x[:4], y[:4], 3),
        coverage_by_loops(y[:4], x[:4], 3),
    )
    for few, many in ((x[:3], y), (x, y[:3])):
        with pytest.raises(ValueError, match=r"num_neighbors is at least 1 and below .*; got 3"):
            precision_recall(few, many, 3)
    assert kernel_distance(x[:2], y[:2], 1) == pytest.approx(kernel_by_loops(x[:2], y[:2]))
    with pytest.raises(ValueError, match="between 1 and the 3 samples; got 4"):
        inception_score(np.full((3, 2), 0.5), 4)


def test_a_read_only_array_is_taken():
    x, y = random_sets(4)
    expected = precision_recall(x, y)
    x.setflags(write=False)
    assert precision_recall(x, y) == expected


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_does():
    x, y = (np.random.default_rng(s).normal(size=(3000, 64)).astype(np.float32) for s in (0, 1))
    y += 0.1
    on_gpu = torch.from_numpy(y).cuda()
    assert precision_recall(x, on_gpu) == precision_recall(x, y)
    assert kernel_distance(x, on_gpu, 3) == pytest.approx(kernel_distance(x, y, 3), rel=1e-9)
