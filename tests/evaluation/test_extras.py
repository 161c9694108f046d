"""The evaluator with all its metrics: one pass, right names, right figures, the same for any workers."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_trials import digits, in_workers, measure_all, tiny_config
from torch import Tensor, nn

from dtr_ray.cache import cache_dir
from dtr_ray.config import EvaluationConfig, TrialConfig
from dtr_ray.config.errors import ConfigError
from dtr_ray.config.read import change_trial
from dtr_ray.data import ImageData
from dtr_ray.distributed import Group
from dtr_ray.evaluation import extras
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.evaluation.features import build_extractor
from dtr_ray.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    statistics,
)
from dtr_ray.evaluation.references import reference_features

ALL = ["kid", "inception_score", "precision_recall"]
NAMES = [f"{kind}_efficientnet_lite0_40" for kind in ("fd", "kd", "is", "precision", "recall")]
REPORTED = [NAMES[0], f"{NAMES[0]}_stderr", *NAMES[1:]]


def config_of(**changes: object) -> TrialConfig:
    return tiny_config(evaluation__num_samples=40, evaluation__extra_metrics=ALL, **changes)


class Blank(nn.Module):
    """Predicts no noise at all; needs no training to be measured."""

    null_label = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0.5 * x, torch.zeros_like(x)], dim=1)


def test_names_follow_the_rule_of_the_distance():
    inception = EvaluationConfig(num_samples=50_000, extra_metrics=ALL)
    assert inception.extra_names == {
        "kid": ("kid_50k",),
        "inception_score": ("is_50k",),
        "precision_recall": ("precision_50k", "recall_50k"),
    }
    other = EvaluationConfig(num_samples=1500, features="efficientnet_lite0", extra_metrics=["kid"])
    assert other.extra_names == {"kid": ("kd_efficientnet_lite0_1500",)}
    assert EvaluationConfig().extra_names == {}
    # The order of the list changes nothing, and a repeated name adds nothing.
    shuffled = EvaluationConfig(num_samples=50_000, extra_metrics=[*ALL[::-1], "kid"])
    assert list(shuffled.extra_names) == ALL


def test_all_metrics_are_measured_on_the_samples_of_one_pass():
    config = config_of()
    data, seen = digits(config), []
    evaluation = Evaluator(config, data, Group(), torch.device("cpu")).evaluate(
        Blank(), on_images=lambda indices, images: seen.append(images)
    )
    assert list(evaluation.metrics) == [*REPORTED, "eval_seconds"]
    samples = torch.cat(seen)
    assert (samples.shape, samples.dtype) == ((40, 1, 8, 8), torch.uint8)
    extractor = build_extractor("efficientnet_lite0")
    fake, real = extractor(samples), reference_features(data, extractor, cache_dir())
    expected = [
        frechet_distance(*statistics(real), *statistics(fake)),
        kernel_distance(real, fake),
        inception_score(extractor.probabilities(fake)),
        *precision_recall(real, fake),
    ]
    found = [evaluation.metrics[name] for name in NAMES]
    assert found == pytest.approx(expected, rel=1e-4)
    without = Evaluator(
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"extra_metrics": []})}),
        data, Group(), torch.device("cpu"),
    )  # fmt: skip
    metrics = without.evaluate(Blank()).metrics
    assert metrics[NAMES[0]] == pytest.approx(found[0], rel=1e-9)
    assert set(metrics) == {*REPORTED[:2], "eval_seconds"}


def test_samples_that_are_not_finite_have_no_figures():
    class Broken(Blank):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, t, y) * torch.nan

    config = config_of()
    found = Evaluator(config, digits(config), Group(), torch.device("cpu")).evaluate(Broken()).metrics
    assert list(found) == [*REPORTED, "eval_seconds"]
    assert all(math.isnan(found[name]) for name in REPORTED)


@pytest.mark.timeout(300)
def test_workers_find_what_one_process_finds(tmp_path: Path):
    alone = measure_all(Group(), tmp_path)
    first, second = in_workers(measure_all, 2, tmp_path / "two")
    assert list(alone) == REPORTED
    assert first == second == pytest.approx(alone, rel=1e-4)


def test_precision_and_recall_look_at_a_bounded_number_of_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "MAX_MANIFOLD_IMAGES", 20)
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(50, 3, generator=rng), torch.randn(30, 3, generator=rng)
    extractor = build_extractor("efficientnet_lite0")
    found = extras.MEASURES["precision_recall"](fake, real.numpy(), extractor)
    assert found == precision_recall(real[:20], fake) != precision_recall(real, fake)


def test_too_few_samples_or_images_are_refused_before_any_is_drawn():
    for metric, least in (("inception_score", 10), ("precision_recall", 4)):
        EvaluationConfig(num_samples=least, extra_metrics=[metric])
        with pytest.raises(
            ConfigError, match=f"evaluation.num_samples.* {least - 1} is too few for {metric}"
        ):
            change_trial(
                tiny_config(),
                [f"evaluation.extra_metrics=[{metric}]", f"evaluation.num_samples={least - 1}"],
                "trial.json",
            )
    few = digits()
    three = ImageData(few.pixels(torch.arange(3)).numpy(), few.labels[:3], 10, "three-digits")
    with pytest.raises(ValueError, match="precision_recall takes at least 4 images; the data has 3"):
        Evaluator(config_of(), three, Group(), torch.device("cpu"))


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(ConfigError, match="'fid' is not one of kid, inception_score, precision_recall"):
        change_trial(tiny_config(), ["evaluation.extra_metrics=[fid]"], "trial.json")


@pytest.mark.parametrize("metric", ALL)
def test_every_metric_has_a_measure(metric: str):
    measure: Callable[..., tuple[float, ...]] = extras.MEASURES[metric]
    config = EvaluationConfig(num_samples=40, extra_metrics=[metric])
    features = torch.randn(40, 1280, generator=torch.Generator().manual_seed(0))
    values = measure(features, features.numpy(), build_extractor("efficientnet_lite0"))
    assert len(values) == len(config.extra_names[metric])
