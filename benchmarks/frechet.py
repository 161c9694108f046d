"""The ways to the Fréchet distance: what they cost, on how many digits they agree.

    python benchmarks/frechet.py [--features 2048] [--samples 1000 10000] [--repeats 1]

Features are drawn from Gaussians whose spectra decay as those of networks do. Times are the process's own,
of one call, beside those of the distance from a known root in the same run. Agreement is with the definition
by singular values, which takes no square root of a matrix.
"""

import argparse
import math
import warnings

import numpy as np
from cleanfid.fid import frechet_distance as by_sqrtm
from clock import seconds
from rich.console import Console
from rich.table import Table

from dtr_ray.evaluation.metrics import (
    covariance_root,
    frechet_distance,
    frechet_distance_of,
    frechet_distance_to,
    statistics,
)
from dtr_ray.evaluation.uncertainty import frechet_estimate


def draw(num_samples: int, num_features: int, seed: int, scale: float) -> np.ndarray:
    """Correlated features, float32 (N, D), whose variances fall as 1 / k."""
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mixing = (
        shared.normal(size=(num_features, num_features)) / np.sqrt(np.arange(1, num_features + 1))[:, None]
    )
    return (rng.normal(size=(num_samples, num_features)) @ mixing * scale + scale).astype(np.float32)


def by_singular_values(mu: np.ndarray, root: np.ndarray, x: np.ndarray) -> float:
    """|mu - mean|^2 + |F|^2 + |Z|^2 - 2 (sum of the singular values of Z F^T), Z scaled by (N - 1)^(-1/2)."""
    centred = (x - x.mean(0, dtype=np.float64)) / math.sqrt(len(x) - 1)
    overlap = np.linalg.svd(centred @ root.T, compute_uv=False).sum()
    shift = x.mean(0, dtype=np.float64) - mu
    return float(shift @ shift + (root**2).sum() + (centred**2).sum() - 2 * overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the ways to the Fréchet distance cost.")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    mu, sigma = statistics(draw(3 * options.features, options.features, 1, 1.0))
    root = covariance_root(sigma)
    for count in options.samples:
        x = draw(count, options.features, 2, 1.1)
        ways = {
            "scipy's sqrtm, as clean-fid": lambda x=x: by_sqrtm(mu, sigma, *statistics(x)),
            "two eigendecompositions": lambda x=x: frechet_distance(mu, sigma, *statistics(x)),
            "root of the data known": lambda x=x: frechet_distance_to(mu, sigma, root, *statistics(x)),
            "from features, N or D as is less": lambda x=x: frechet_distance_of(mu, sigma, root, x),
            "the same with standard error": lambda x=x: frechet_estimate(mu, sigma, root, x).distance,
        }
        title = f"{count} samples of {options.features} features, statistics of the samples included"
        table = Table(title=title, title_justify="left")
        for heading in ("way", "s", "ratio", "agreement"):
            table.add_column(heading, justify="left" if heading == "way" else "right")
        with warnings.catch_warnings():
            # Of singular matrices, and of an argument that clean-fid still gives to scipy.
            warnings.simplefilter("ignore")
            values = {way: step() for way, step in ways.items()}
            times = {way: seconds(step, "cpu", options.repeats) for way, step in ways.items()}
        exact, unit = by_singular_values(mu, root, x), times["root of the data known"]
        for way, value in values.items():
            off = abs(value / exact - 1)
            digits = f"{-math.log10(off):.1f} digits" if off else "equal"
            table.add_row(way, f"{times[way]:.2f}", f"{times[way] / unit:.2f}", digits)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
