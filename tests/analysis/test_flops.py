"""Parameters and GFLOPs: the papers' tables to their last digit, and independent counts of small models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import tiny_config

from dtr_ray import analyze
from dtr_ray.analysis.flops import costs_of, count_parameters, gflops, model_cost
from dtr_ray.config import ModelConfig
from dtr_ray.config.presets import PRESETS
from dtr_ray.models import build_model

# Millions of parameters; GFLOPs at patch 2, of latents 4 x 32 x 32 (the DiT paper's).
PAPER = {"S": (33, 6.06), "B": (130, 23.01), "L": (458, 80.71), "XL": (675, 118.64)}
# DTR, table 7.
WITH_DTR = {"S": 6.06, "B": 23.02, "L": 80.73}
ROUTINGS: list[dict[str, Any]] = [
    {"name": "dtr"},
    {"name": "dtr", "rule": "equation"},
    {"name": "random"},
    {"name": "max_roaming"},
    {"name": "clustered"},
    {"name": "explicit_clustered"},
    {"name": "scheduled"},
]


@pytest.mark.parametrize("size", PAPER)
def test_parameters_are_the_papers(size: str):
    millions, _ = PAPER[size]
    assert int(model_cost(f"DiT-{size}/2").parameters / 1e6 + 0.5) == millions


@pytest.mark.parametrize("size", PAPER)
def test_gflops_are_the_dit_papers_to_the_last_digit(size: str):
    _, figure = PAPER[size]
    assert round(gflops(f"DiT-{size}/2"), 2) == figure


@pytest.mark.parametrize("size", WITH_DTR)
def test_gflops_with_routing_are_dtrs_to_the_last_digit(size: str):
    assert round(gflops(f"DiT-{size}/2", {"name": "dtr"}), 2) == WITH_DTR[size]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: "-".join(r.values()))
def test_no_routing_adds_a_parameter_or_changes_the_multiply_adds(routing: dict[str, Any]):
    plain, routed = model_cost("DiT-S/2"), model_cost("DiT-S/2", routing)
    assert routed.parameters == plain.parameters
    assert (routed.multiply_adds, routed.normalised) == (plain.multiply_adds, plain.normalised)
    # Three for each of 12 blocks' 256 x 384 values, and the complement of the mask's row, once or a block.
    values = 12 * 256 * 384
    assert 0 <= routed.routing - 3 * values <= 12 * 384
    built = build_model({"name": "DiT-T/8"}, routing)
    assert count_parameters(built) == model_cost("DiT-T/8").parameters


def test_all_channels_on_cost_nothing():
    assert model_cost("DiT-S/2", {"name": "dtr", "beta": 1.0}).routing == 0


def test_multiply_adds_are_those_written_out_by_hand():
    config = {"name": "DiT", "hidden_size": 8, "depth": 3, "num_heads": 2, "patch_size": 2}
    config |= {"input_size": 8, "in_channels": 4, "num_classes": 5}
    tokens, channels = 16, 8
    block = tokens * 12 * channels**2 + 6 * channels**2 + 2 * tokens**2 * channels
    embed = tokens * (2 * 2 * 4) * channels + 256 * channels + channels**2
    final = 2 * channels**2 + tokens * channels * (2 * 2 * 8)
    found = model_cost(config)
    assert found.multiply_adds == 3 * block + embed + final
    assert found.normalised == (2 * 3 + 1) * tokens * channels
    assert found.gflops == (found.multiply_adds + found.normalised) / 1e9


@pytest.mark.parametrize("name", ["DiT-T/8", "Switch-DiT-T/8", "Multi-DiT-T/8", "ADM-T"])
def test_parameters_are_those_of_the_model_that_is_trained(name: str):
    sizes = {"name": name, "in_channels": 3, "input_size": 16, "num_classes": 10}
    built = build_model(sizes)
    expected = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert model_cost(sizes).parameters == count_parameters(built) == expected
    assert model_cost(sizes).gflops > 0


def test_of_several_experts_one_runs_and_all_are_parameters():
    one, four = model_cost("DiT-B/2"), model_cost("Multi-DiT-B/2")
    assert four.parameters == 4 * one.parameters
    # DTR, appendix: 521M.
    assert round(four.parameters / 1e6) == 521
    assert four.gflops == one.gflops


def test_sparse_experts_cost_more_than_none():
    assert gflops("Switch-DiT-S/2") > gflops("DiT-S/2")


def test_text_costs_its_cross_attention():
    text = ModelConfig(name="DiT-S/2", text_channels=768)
    plain, conditioned = model_cost("DiT-S/2"), model_cost(text)
    tokens, words, channels = 256, 77, 384
    block = 2 * tokens * channels**2 + words * 768 * 2 * channels + 2 * tokens * words * channels
    assert conditioned.multiply_adds == plain.multiply_adds + 12 * block


def test_counting_needs_neither_memory_nor_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model_cost("DiT-XL/2", {"name": "dtr"})
    assert torch.equal(torch.rand(1), expected)


def test_the_command_counts_a_name_without_and_with_routing(capsys: pytest.CaptureFixture[str]):
    assert analyze.main(["flops", "DiT-B/2"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == ["DiT-B/2"]]
    assert rows == [["DiT-B/2", "none", "130.32M", "23.01"], ["DiT-B/2", "dtr", "130.32M", "23.02"]]
    assert "a multiply-add counts once" in text


def test_the_command_counts_what_a_file_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_config(model__name="Switch-DiT-T/4", routing__name="none")
    config.save(tmp_path / "trial.json")
    assert analyze.main(["flops", str(tmp_path / "trial.json")]) == 0
    assert ["Switch-DiT-T/4", "none"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    found = costs_of(str(tmp_path / "trial.json"), ["model.name=DiT-T/4", "routing.name=random"])
    assert [row[:2] for row in found] == [("DiT-T/4", "none"), ("DiT-T/4", "random")]
    assert found[0][2].parameters == count_parameters(
        build_model(tiny_config(model__name="DiT-T/4").resolved_model)
    )


def test_the_command_counts_the_fixed_part_of_a_sweep():
    rows = costs_of(str(Path(__file__).parents[2] / "search_spaces" / "ffhq.yaml"))
    assert [row[:2] for row in rows] == [("DiT-B/2", "none"), ("DiT-B/2", "dtr")]
    assert round(rows[1][2].gflops, 2) == 23.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DiT-Q/2"], "'DiT-Q/2' is no model; did you mean DiT-"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["DiT-S/2", "--set", "model.depth=2"], "--set is for a YAML or a folder, not for the name DiT-S/2"),
    ],
)
def test_what_is_no_model_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert analyze.main(["flops", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_every_preset_can_be_counted():
    for name in PRESETS:
        if name.endswith(("T/8", "T", "64")):
            assert gflops(name) > 0
