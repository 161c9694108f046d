"""Rank correlations agree with scipy's, and their uncertainty is what it says."""

import numpy as np
import pytest
from scipy import stats

from dtr_ray.analysis.ranks import kendall, kept, spearman


@pytest.mark.parametrize("count", [3, 6, 9, 25])
def test_coefficients_are_scipys_with_and_without_ties(count: int) -> None:
    rng = np.random.default_rng(count)
    for number in range(5):
        x, y = rng.normal(size=(2, count))
        y = x + y
        if number % 2:
            x, y = np.round(x), np.round(y)
        if np.ptp(x) and np.ptp(y):
            assert spearman(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic)
            assert kendall(x, y).value == pytest.approx(stats.kendalltau(x, y).statistic)


def test_the_p_value_of_few_things_is_exact() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 6, 8):
        x, y = rng.normal(size=(2, count))
        assert kendall(x, y).p_value == pytest.approx(stats.kendalltau(x, y, method="exact").pvalue)
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]).p_value == pytest.approx(2 / 24)


def test_the_p_value_of_many_things_is_close() -> None:
    x, y = np.random.default_rng(3).normal(size=(2, 12))
    assert kendall(x, y).p_value == pytest.approx(stats.kendalltau(x, y, method="exact").pvalue, abs=0.02)


def test_an_interval_covers_the_true_correlation_about_as_often_as_it_says() -> None:
    """Spearman's rho of a normal pair of correlation r is 6 / pi * arcsin(r / 2)."""
    true = 6 / np.pi * np.arcsin(0.7 / 2)
    rng, covered = np.random.default_rng(1), 0
    for seed in range(30):
        x, noise = rng.normal(size=(2, 25))
        found = spearman(x, 0.7 * x + np.sqrt(1 - 0.49) * noise, seed)
        covered += found.low <= true <= found.high
    assert covered >= 25


def test_the_same_seed_gives_the_same_interval() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    assert spearman(x, y) == spearman(x, y)


def test_equal_figures_have_no_order() -> None:
    found = kendall([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert np.isnan([found.value, found.low, found.high, found.p_value]).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], "at least 3"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], r"got \(3,\), \(2,\)"),
        ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0], "finite"),
    ],
)
def test_what_has_no_correlation_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spearman(x, y)


def test_what_a_cut_by_one_figure_leaves_of_the_best_by_the_other() -> None:
    assert kept([1, 2, 3, 4], [1, 2, 3, 4], 2) == 2
    assert kept([1, 2, 3, 4], [4, 1, 2, 3], 2) == 1
    assert kept([1, 2, 3, 4], [4, 3, 2, 1], 2) == 0
