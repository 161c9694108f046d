import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_trials import digits, process_context, save_for_ever, tensors_of, tiny_config, train

from dtr_ray.training.state import (
    CONFIG_FILE,
    EMA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TRAINING_FILE,
    TrainingState,
    checkpoint_folder,
    find_damage,
    latest_checkpoint,
    prune_checkpoints,
)

CPU = torch.device("cpu")
FILES = [MODEL_FILE, EMA_FILE, TRAINING_FILE, CONFIG_FILE, MANIFEST_FILE]


def saved(folder: Path, *steps: int) -> TrainingState:
    config = tiny_config()
    state = TrainingState.build(config, CPU)
    for step in steps:
        state.step = step
        state.save(checkpoint_folder(folder, step), config)
    return state


def steps_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_seed_alone_fixes_the_first_weights():
    torch.manual_seed(1)
    one = tensors_of(TrainingState.build(tiny_config(training__seed=3), CPU))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = tensors_of(TrainingState.build(tiny_config(training__seed=3, training__lr=1.0), CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = tensors_of(TrainingState.build(tiny_config(training__seed=4), CPU))
    assert not all(torch.equal(one[name], third[name]) for name in one)


def test_the_average_starts_at_the_model_and_follows_it():
    state = TrainingState.build(tiny_config(), CPU)
    first = [weight.clone() for weight in state.ema.parameters()]
    with torch.no_grad():
        for weight in state.model.parameters():
            weight += 1
    state.update_ema(0.75)
    for before, after in zip(first, state.ema.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.25)
        assert not after.requires_grad


def test_the_balancer_has_its_own_learning_rate_and_no_decay():
    config = tiny_config(weighting__name="ant_uw", weighting__lr=0.5, training__weight_decay=0.1)
    model, balancer = TrainingState.build(config, CPU).optimizer.param_groups
    assert (model["lr"], model["weight_decay"]) == (3e-3, 0.1)
    assert (balancer["lr"], balancer["weight_decay"]) == (0.5, 0.0)


def test_a_checkpoint_gives_back_all_that_was_saved(tmp_path: Path):
    config = tiny_config(weighting__name="ant_uw", training__num_steps=3, evaluation__every_steps=3)
    list(train(config, tmp_path, digits(config)))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
    first, second = (TrainingState.build(config, CPU) for _ in range(2))
    first.load(checkpoint, config)
    first.losses, first.train_seconds = [0.1, 1 / 3], 2.5
    first.save(tmp_path / "copy", config)
    second.load(tmp_path / "copy", config)
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("optimizer.") for name in one)
    assert any("balancer" in name for name in one)
    assert (second.step, second.losses, second.train_seconds) == (3, [0.1, 1 / 3], 2.5)


def test_learning_rates_are_those_of_the_configuration_not_of_the_checkpoint(tmp_path: Path):
    saved(tmp_path, 1)
    config = tiny_config(training__lr=0.125, training__weight_decay=0.5)
    state = TrainingState.build(config, CPU)
    state.load(checkpoint_folder(tmp_path, 1), config)
    group = state.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.5)


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"model__depth": 2}, "model"),
        ({"routing__name": "none"}, "routing"),
        ({"diffusion__schedule": "linear"}, "diffusion"),
        ({"weighting__name": "ant_uw"}, "weighting"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, changes: dict[str, object], section: str):
    saved(tmp_path, 1)
    config = tiny_config(**changes)
    with pytest.raises(ValueError, match=f"was trained with {section} "):
        TrainingState.build(config, CPU).load(checkpoint_folder(tmp_path, 1), config)


def test_no_weights_are_pickled(tmp_path: Path):
    saved(tmp_path, 1)
    sums = json.loads((checkpoint_folder(tmp_path, 1) / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert sorted(sums) == sorted(set(FILES) - {MANIFEST_FILE})
    # weights_only refuses everything but tensors and plain values.
    torch.load(checkpoint_folder(tmp_path, 1) / TRAINING_FILE, weights_only=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
):
    saved(tmp_path, 4, 12)
    newest = checkpoint_folder(tmp_path, 12)
    assert latest_checkpoint(tmp_path) == newest
    content = (newest / name).read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "emptied": b"",
    }
    if how == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(damaged[how])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 4)
    assert str(newest) in caplog.text
    assert "is damaged" in caplog.text
    config = tiny_config()
    with pytest.raises(ValueError, match="is missing or damaged"):
        TrainingState.build(config, CPU).load(newest, config)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    saved(tmp_path, 1)
    (checkpoint_folder(tmp_path, 1) / MODEL_FILE).unlink()
    assert latest_checkpoint(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    saved(tmp_path, 99_999_999, 100_000_000)
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 100_000_000)


def test_half_a_checkpoint_is_not_seen_and_goes_with_the_next(tmp_path: Path):
    saved(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".00000002.part"
    half.mkdir()
    (half / MODEL_FILE).write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    saved(tmp_path, 2)
    assert find_damage(checkpoint_folder(tmp_path, 2)) is None
    (tmp_path / "checkpoints" / ".00000009.part").mkdir()
    prune_checkpoints(tmp_path, {2})
    assert steps_on_disk(tmp_path) == ["00000002"]


def test_pruning_keeps_the_named_steps_and_no_others(tmp_path: Path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    prune_checkpoints(tmp_path, {2, 4, 77})
    assert steps_on_disk(tmp_path) == ["00000002", "00000004"]


def test_pruning_a_trial_without_checkpoints_does_nothing(tmp_path: Path):
    prune_checkpoints(tmp_path, {1})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_only_whole_checkpoints(tmp_path: Path):
    torn = 0
    for trial in range(8):
        folder = tmp_path / str(trial)
        process = process_context().Process(target=save_for_ever, args=(str(folder),))
        process.start()
        while not checkpoint_folder(folder, 2).exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.0037 * trial)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        checkpoints = sorted((folder / "checkpoints").glob("[0-9]*"))
        assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
        assert latest_checkpoint(folder) == checkpoints[-1]
        torn += any((folder / "checkpoints").glob(".*.part"))
    assert torn > 0  # or the test would not have tried what it is for


@pytest.mark.parametrize("where", ["model", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found(where: str, value: float):
    state = TrainingState.build(tiny_config(), CPU)
    assert state.is_finite()
    with torch.no_grad():
        list(getattr(state, where).parameters())[-1][0] = value
    assert not state.is_finite()
