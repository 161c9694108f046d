"""A figure's identity: what changes what it measures, and what does not."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_sweeps import METRIC, SWEEP, tiny_sweep
from tiny_trials import tiny_config

from dtr_ray.config import SweepConfig, override
from dtr_ray.config.errors import ConfigError
from dtr_ray.config.ignored import config_warnings
from dtr_ray.config.protocol import UNKNOWN, describe, differences, groups, protocol_of
from dtr_ray.config.read import read_sweep

PROXY: dict[str, Any] = {"until_step": 4, "num_samples": 8, "num_steps": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling__sampler", "ddpm"),
        ("sampling__num_steps", 3),
        ("sampling__clip_denoised", False),
        ("evaluation__num_samples", 17),
        ("evaluation__features", "inception"),
        ("evaluation__seed", 1),
        ("data__resolution", 16),
        ("data__num_classes", 1),
    ],
)
def test_what_changes_the_figure_changes_the_protocol(key: str, value: Any) -> None:
    assert differences(protocol_of(tiny_config(**{key: value})), protocol_of(tiny_config()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling__guidance_scale", 2.0),
        ("evaluation__batch_size", 3),
        ("evaluation__every_steps", 3),
        ("evaluation__standard_error", False),
        ("evaluation__extra_metrics", ["kid"]),
        ("evaluation__proxy", PROXY),
        ("training__lr", 1.0),
        ("routing", {"name": "dtr", "alpha": 1.0}),
        ("data__horizontal_flip", True),
    ],
)
def test_what_a_method_may_choose_is_no_part_of_it(key: str, value: Any) -> None:
    assert not differences(protocol_of(tiny_config(**{key: value})), protocol_of(tiny_config()))


def test_guided_channels_count_where_there_are_more_than_three() -> None:
    vae = {"data": {"name": "mnist", "resolution": 32, "vae": "./vae"}, "sampling__clip_denoised": False}
    three = {"sampling__guidance_channels": "first_three"}
    assert not differences(protocol_of(tiny_config(**three)), protocol_of(tiny_config()))
    assert differences(protocol_of(tiny_config(**vae, **three)), protocol_of(tiny_config(**vae)))


def test_a_proxy_is_a_protocol_of_its_own() -> None:
    trial = tiny_config(evaluation__proxy=PROXY)
    full, proxy = protocol_of(trial), protocol_of(trial, proxy=True)
    assert proxy["metric"] == "proxy_fd_efficientnet_lite0_8"
    assert differences(proxy, full) == [
        "evaluation.num_samples is 8, not 16",
        "sampling.num_steps is 1, not 2",
    ]
    assert (full["sampling.sampler"], proxy["sampling.sampler"]) == ("ddim", "ddim")


def test_known_images_are_compared_by_what_they_are_and_not_by_where_they_lie() -> None:
    here, there = ({"data": {"name": "folder", "path": path, "resolution": 8}} for path in ("a", "b"))
    one, other = protocol_of(tiny_config(**here), "x"), protocol_of(tiny_config(**there), "x")
    assert not differences(one, other)
    assert differences(one, {**other, "data.identity": "y"})
    assert differences(protocol_of(tiny_config(**here)), protocol_of(tiny_config(**there)))
    assert not differences(one, protocol_of(tiny_config(**here)))


def test_the_unknown_differs_from_all_that_is_known() -> None:
    known = protocol_of(tiny_config())
    assert not differences({}, {})
    assert UNKNOWN in differences({}, known)[0]
    assert groups([known, {}, {}, known, protocol_of(tiny_config(), "x")]) == [known, {}]


def test_the_description_is_one_line_with_all_that_matters() -> None:
    text = describe(protocol_of(tiny_config(), "digits-8-abc"))
    assert text == (
        "fd_efficientnet_lite0_16: 16 samples, ddim in 2 steps, seed 0, clipped; "
        "digits at 8 px, 10 classes (digits-8-abc)"
    )
    assert describe({}) == UNKNOWN


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling.num_steps", {"type": "int", "low": 1, "high": 2}),
        ("sampling.sampler", {"type": "choice", "values": ["ddim", "ddpm"]}),
        ("sampling.clip_denoised", {"type": "choice", "values": [True, False]}),
        ("evaluation.seed", {"type": "choice", "values": [0, 1]}),
        ("data.num_classes", {"type": "choice", "values": [1, 10]}),
        ("data.resolution", {"type": "choice", "values": [8, 16]}),
    ],
)
def test_a_space_that_searches_the_protocol_is_refused_at_its_line(
    key: str, value: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "space": {key: value}}), encoding="utf-8")
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip() == f"{key}:")
    with pytest.raises(ConfigError, match=rf"{path}:{line}: space\.{key}: .*do not compare.*set it in trial"):
        read_sweep(path)


@pytest.mark.parametrize("key", ["evaluation.every_steps", "evaluation.proxy.num_samples"])
def test_with_a_proxy_all_trials_report_it_alike(key: str, tmp_path: Path) -> None:
    space = {key: {"type": "choice", "values": [5, 10]}}
    proxy = {"until_step": 10, "num_samples": 10}
    with pytest.raises(ValueError, match=f"space.{key}: .*cannot be searched with a proxy"):
        tiny_sweep(tmp_path, space=space, trial__evaluation__proxy=proxy, early_stopping={"name": "none"})


def test_guidance_and_how_often_is_evaluated_may_be_searched(tmp_path: Path) -> None:
    space = {
        "sampling.guidance_scale": {"type": "uniform", "low": 1.0, "high": 3.0},
        "evaluation.every_steps": {"type": "choice", "values": [10, 20]},
    }
    assert tiny_sweep(tmp_path, space=space).objective == METRIC


def test_a_rung_that_a_proxy_decides_and_a_sigma_without_errors_are_told() -> None:
    def warnings(**changes: Any) -> str:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return "\n".join(config_warnings(SweepConfig.from_dict(override(SWEEP, dotted))))

    proxy = {"until_step": 10, "num_samples": 8}
    assert "trials are stopped there by proxy_" in warnings(trial__evaluation__proxy=proxy)
    assert "stopped there" not in warnings(trial__evaluation__proxy={**proxy, "until_step": 9})
    assert "sigma is ignored" in warnings(early_stopping__sigma=1.0, trial__evaluation__standard_error=False)
    assert not warnings(early_stopping__sigma=1.0)
