"""The evaluator: the same samples and figures however they are computed, proxies, and where the time goes."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_trials import (
    BATCH_SIZES,
    METRIC,
    digits,
    evaluate_in_batches,
    in_workers,
    tiny_config,
)
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.distributed import Group
from dtr_ray.evaluation.blocks import BLOCK_IMAGES, Blocks
from dtr_ray.evaluation.evaluate import Evaluation, Evaluator
from dtr_ray.training import TrainingState, train

CPU = torch.device("cpu")
NAMES = [f"{kind}_efficientnet_lite0_120" for kind in ("fd", "is")] + ["fd_efficientnet_lite0_120_stderr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a trained `trial`."""
    config, path = tiny_config(), tmp_path_factory.mktemp("evaluator")
    list(train(config, path / "trial", digits(config)))
    return path


def untrained(config: TrialConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return TrainingState.build(config, CPU).model.eval()


@pytest.mark.timeout(300)
def test_neither_workers_nor_batch_size_change_a_sample_or_a_figure(folder: Path):
    groups = [[evaluate_in_batches(Group(), folder / "alone")]]
    groups += [in_workers(evaluate_in_batches, count, folder / f"workers-{count}") for count in (2, 3)]
    assert not [one for found in groups for one in found if isinstance(one, Exception)]
    for precision in ("fp32", "bf16"):
        images, metrics = groups[0][0][f"{precision}, {BATCH_SIZES[0]} at once"]
        assert list(images) == list(range(120))
        assert set(metrics) == {*NAMES}
        for found, size in itertools.product(groups, BATCH_SIZES):
            parts = [one[f"{precision}, {size} at once"] for one in found]
            # All workers know the figures; each has drawn its own samples.
            assert sum(len(drawn) for drawn, _ in parts) == len(images)
            drawn = {number: image for own, _ in parts for number, image in own.items()}
            assert all(torch.equal(drawn[number], image) for number, image in images.items())
            assert [figures for _, figures in parts] == [pytest.approx(metrics, rel=1e-5)] * len(parts)
    # The precision itself does make a difference.
    assert groups[0][0]["fp32, 7 at once"][1] != groups[0][0]["bf16, 7 at once"][1]


@pytest.mark.parametrize("num_samples", [1, 49, 50, 51, 120, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_share_the_same_blocks_without_overlap_or_loss(num_samples: int, world_size: int):
    shares = [Blocks(num_samples, Group(rank, world_size)).mine() for rank in range(world_size)]
    blocks = sorted((block.tolist() for share in shares for block in share), key=min)
    assert blocks == [block.tolist() for block in Blocks(num_samples, Group()).mine()]
    assert [number for block in blocks for number in block] == list(range(num_samples))
    assert all(len(block) == BLOCK_IMAGES for block in blocks[:-1])
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1


def evaluated(config: TrialConfig, *, proxy: bool = False) -> tuple[Evaluation, Tensor]:
    seen: list[Tensor] = []
    evaluation = Evaluator(config, digits(config), Group(), CPU).evaluate(
        untrained(config), on_images=lambda indices, images: seen.append(images), proxy=proxy
    )
    return evaluation, torch.cat(seen)


def test_a_proxy_draws_fewer_samples_and_reports_under_its_own_name():
    config = tiny_config(
        evaluation__num_samples=60,
        evaluation__extra_metrics=["inception_score"],
        evaluation__proxy={"until_step": 3, "num_samples": 55},
    )
    full, images = evaluated(config)
    cheap, first = evaluated(config, proxy=True)
    name = "proxy_fd_efficientnet_lite0_55"
    assert set(cheap.metrics) == {name, f"{name}_stderr", "eval_seconds"}
    assert "fd_efficientnet_lite0_60" in full.metrics
    assert len(first) == 55
    # The first samples are the full evaluation's own.
    assert torch.equal(first[:50], images[:50])


def test_a_proxys_sampler_and_steps_are_its_own():
    changes = {"evaluation__proxy": {"until_step": 3, "sampler": "dpm_solver++", "num_steps": 3}}
    as_proxy, images = evaluated(tiny_config(**changes), proxy=True)
    as_trial, expected = evaluated(tiny_config(sampling__sampler="dpm_solver++", sampling__num_steps=3))
    assert torch.equal(images, expected)
    assert as_proxy.metrics[f"proxy_{METRIC}"] == pytest.approx(as_trial.metrics[METRIC], rel=1e-9)


def test_without_a_configured_proxy_there_is_none():
    with pytest.raises(ValueError, match=r"evaluation\.proxy is not set"):
        evaluated(tiny_config(), proxy=True)


def test_the_distance_is_reported_alone_where_nothing_else_is_asked_for():
    config = tiny_config(evaluation__standard_error=False)
    assert set(evaluated(config)[0].metrics) == {METRIC, "eval_seconds"}
    # Of two samples there is no standard error.
    two = evaluated(tiny_config(evaluation__num_samples=2))[0].metrics
    assert set(two) == {"fd_efficientnet_lite0_2", "eval_seconds"}


def test_the_parts_of_the_time_add_up_to_the_whole():
    evaluation, _ = evaluated(tiny_config())
    assert set(evaluation.seconds) == {"sampling", "decoding", "features", "distance", "waiting"}
    assert all(seconds >= 0 for seconds in evaluation.seconds.values())
    assert sum(evaluation.seconds.values()) == pytest.approx(evaluation.metrics["eval_seconds"], abs=0.05)
