"""The metrics that papers report beside the Fréchet distance, on the features of the same samples.

Two conventions are in use. clean-fid's (Parmar et al., 2022): features of images that are resized with care;
ours for all metrics. The ADM evaluation's (Dhariwal & Nichol, 2021), which the papers of DiT and DTR follow:
the same network, resized in its TensorFlow graph, 50,000 samples against published reference batches. Where
clean-fid has no such metric (Inception score, precision, recall), the rest is as ADM's. Figures of the two
do not compare: docs/evaluation.md.

Shapes: M samples, N images of the data, D features.
"""

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.metrics import inception_score, kernel_distance, precision_recall

NUM_SPLITS = 10
"""Parts of the samples whose Inception scores are averaged, however many samples there are."""
NUM_NEIGHBORS = 3
"""Of precision and recall (k)."""
MAX_MANIFOLD_IMAGES = 10_000
"""Images of the data that precision and recall look at: as many as in the ADM evaluation's batches."""

Features = NDArray[np.float32]
# (the samples' features (M, D), the data's (N, D) or None where it is not needed, what gave them) -> values.
Measure = Callable[[Tensor, Features | None, Extractor], tuple[float, ...]]


def needs_features(metrics: Collection[str], num_images: int) -> bool:
    """Whether some of the extra metrics need the data's own features, of which there are `num_images`.

    Raises:
        ValueError: the data has too few images for a metric.
    """
    if "precision_recall" in metrics and num_images <= NUM_NEIGHBORS:
        raise ValueError(
            f"evaluation.extra_metrics: precision_recall takes at least {NUM_NEIGHBORS + 1} images; "
            f"the data has {num_images}"
        )
    return bool({"kid", "precision_recall"} & set(metrics))


def _kid(samples: Tensor, data: Features | None, extractor: Extractor) -> tuple[float, ...]:
    """clean-fid's: the mean over 100 pairs of random subsets of 1,000 (of all, where there are fewer)."""
    assert data is not None
    return (kernel_distance(data, samples),)


def _inception_score(samples: Tensor, data: Features | None, extractor: Extractor) -> tuple[float, ...]:
    """The mean over 10 consecutive parts of the samples, each of which has all classes in turn."""
    return (inception_score(extractor.probabilities(samples), NUM_SPLITS),)


def _precision_recall(samples: Tensor, data: Features | None, extractor: Extractor) -> tuple[float, ...]:
    """With k = 3, of all samples and at most 10,000 random images of the data."""
    assert data is not None
    return precision_recall(data[:MAX_MANIFOLD_IMAGES], samples, NUM_NEIGHBORS)


MEASURES: dict[str, Measure] = {
    "kid": _kid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
}
"""Values of each extra metric, in the order of its names in `EvaluationConfig.extra_names`."""
