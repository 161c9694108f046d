"""The affinity of a trained model's timesteps: what the gradients themselves say, however shared out."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trials import TINY

from dtr_ray.analysis.affinity import (
    Part,
    Settings,
    cosines,
    find_measured,
    measure_affinity,
    part_gradients,
    run_in_process,
)
from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.data import load_images
from dtr_ray.data.order import batch_indices
from dtr_ray.diffusion.affinity import Affinity
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.export.trained import open_model
from dtr_ray.training.batches import keyed_generator
from dtr_ray.training.state import TrainingState

SETTINGS = Settings(num_measured=12, num_batches=3, batch_size=16, seed=5, sketch_size=10**6)


@pytest.fixture(scope="module")
def exact(trained: Path) -> Affinity:
    return measure_affinity(trained, SETTINGS)


def gradients_by_hand(folder: Path, settings: Settings, batch: int) -> np.ndarray:
    """Plain backward passes, image by image and averaged; (n, P) float64."""
    found = open_model(folder)
    config: TrialConfig = found.config
    model = found.model.requires_grad_(True)
    data, total = load_images(config.data, cache_dir()), config.diffusion.num_timesteps
    indices = batch_indices(len(data), settings.batch_size, batch, settings.seed)
    x, y = data.batch(indices), data.labels[indices]
    # Stream 1 is the noise of training's batches.
    noise = torch.randn(x.shape, generator=keyed_generator(settings.seed, 1, batch))
    schedule = noise_schedule(config.diffusion.schedule, total)
    rows = []
    for t in settings.timesteps(total):
        model.zero_grad()
        for i in range(len(x)):
            losses = diffusion_losses(
                model, schedule, x[i : i + 1], torch.tensor([t]), noise[i : i + 1], {"y": y[i : i + 1]}
            )
            (losses["loss"].sum() / len(x)).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    return torch.stack(rows).numpy()


def test_it_is_the_mean_cosine_of_the_gradients(trained: Path, exact: Affinity):
    wanted = np.zeros((12, 12))
    for batch in range(SETTINGS.num_batches):
        rows = gradients_by_hand(trained, SETTINGS, batch)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        wanted += rows @ rows.T / SETTINGS.num_batches
    np.testing.assert_allclose(exact.matrix, wanted, atol=2e-5)


def test_it_is_a_matrix_of_cosines(exact: Affinity):
    assert exact.matrix.shape == (12, 12)
    np.testing.assert_array_equal(exact.matrix, exact.matrix.T)
    np.testing.assert_array_equal(np.diag(exact.matrix), 1)
    assert np.abs(exact.matrix).max() <= 1
    assert exact.timesteps.tolist() == [0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49]
    assert exact.num_timesteps == 50


def test_near_timesteps_agree_more_than_distant_ones(exact: Affinity):
    gap = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    assert exact.matrix[gap == 1].mean() > exact.matrix[gap >= 6].mean() + 0.1


def test_sketches_change_it_by_no_more_than_they_state(trained: Path, exact: Affinity):
    size = 2000
    found = measure_affinity(trained, dataclasses.replace(SETTINGS, sketch_size=size))
    error = np.sqrt(np.mean((found.matrix - exact.matrix)[np.triu_indices(12, 1)] ** 2))
    # Batches have sketches of their own, so that their errors average out; twice the error for gradients
    # whose weight is on few parameters.
    stated = np.sqrt(
        np.mean((1 - exact.matrix[np.triu_indices(12, 1)] ** 2) ** 2) / size / SETTINGS.num_batches
    )
    assert 0 < error < 2 * stated


def test_the_order_of_the_parts_does_not_matter(trained: Path, exact: Affinity):
    told = []

    def backwards(work, parts):
        yield from reversed(list(run_in_process(work, parts)))

    found = measure_affinity(trained, SETTINGS, backwards, lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(found.matrix, exact.matrix)
    assert told == [(i, 6) for i in range(1, 7)]


def test_a_part_does_not_depend_on_those_before(trained: Path):
    checkpoint = next((trained / "checkpoints").iterdir())
    settings = dataclasses.replace(SETTINGS, sketch_size=500)
    whole = part_gradients(Part(str(checkpoint), settings, 1, 0, (3, 8, 21)), "cpu")
    alone = part_gradients(Part(str(checkpoint), settings, 1, 1, (8,)), "cpu")
    np.testing.assert_array_equal(whole[1:2], alone)
    other = part_gradients(Part(str(checkpoint), settings, 2, 1, (8,)), "cpu")
    assert not np.array_equal(alone, other)


@pytest.mark.parametrize("name", ["Switch-DiT-T/4", "Multi-DiT-T/4", "ADM-T"])
def test_every_family_of_models_can_be_measured(name: str, tmp_path: Path):
    config = TrialConfig.from_dict(TINY | {"model": {"name": name}, "routing": {"name": "none"}})
    TrainingState.build(config, torch.device("cpu")).save(tmp_path / "checkpoint", config)
    settings = dataclasses.replace(SETTINGS, num_measured=8, num_batches=1, batch_size=2)
    found = measure_affinity(tmp_path / "checkpoint", settings).matrix
    np.testing.assert_array_equal(np.diag(found), 1)
    if name.startswith("Multi"):
        # Experts of different timesteps share no weights: their gradients are at right angles, but for the
        # error of the sketches.
        assert abs(found[0, -1]) < 5e-3
    assert np.unique(found).size > 4


def test_what_was_measured_is_found_again_and_nothing_else(trained: Path, exact: Affinity, tmp_path: Path):
    output = tmp_path / "a.npz"
    assert find_measured(output, trained, SETTINGS) is None
    exact.save(output)
    found = find_measured(output, trained, SETTINGS)
    assert found is not None
    np.testing.assert_array_equal(found.matrix, exact.matrix)
    for change in ({"seed": 6}, {"num_measured": 11}, {"num_batches": 2}, {"sketch_size": 9}):
        assert find_measured(output, trained, dataclasses.replace(SETTINGS, **change)) is None


def test_a_copy_of_the_model_is_the_same_model_and_another_is_not(
    trained: Path, exact: Affinity, tmp_path: Path
):
    exact.save(tmp_path / "a.npz")
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert find_measured(tmp_path / "a.npz", copy, SETTINGS) is not None
    weights = next(copy.glob("checkpoints/*/ema.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    # As a checkpoint of its own, since a trial's folder passes over damaged ones.
    assert find_measured(tmp_path / "a.npz", weights.parent, SETTINGS) is None


def test_a_file_of_another_kind_is_not_written_over(trained: Path, tmp_path: Path):
    (tmp_path / "a.npz").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is no affinity file"):
        find_measured(tmp_path / "a.npz", trained, SETTINGS)


@pytest.mark.parametrize("count", [1, 51])
def test_timesteps_that_the_model_does_not_have_are_refused(trained: Path, count: int):
    with pytest.raises(
        ValueError, match=f"{count} timesteps are to be measured: it must be from 2 to all 50"
    ):
        measure_affinity(trained, dataclasses.replace(SETTINGS, num_measured=count))


@pytest.mark.parametrize("change", [{"num_batches": 0}, {"batch_size": 0}, {"seed": -1}, {"sketch_size": 0}])
def test_settings_out_of_range_are_refused(change: dict[str, int]):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is {change[name]}: it must be at least"):
        Settings(**change)


def test_all_timesteps_can_be_measured():
    assert Settings(num_measured=50).timesteps(50) == list(range(50))
    assert Settings(num_measured=2).timesteps(1000) == [0, 999]


def test_a_gradient_without_a_direction_is_told_with_its_timestep(trained: Path, tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(next((trained / "checkpoints").iterdir()), checkpoint)
    weights = load_file(checkpoint / "ema.safetensors")
    weights["x_embedder.proj.bias"][0] = torch.nan
    save_file(weights, checkpoint / "ema.safetensors")
    (checkpoint / "manifest.json").unlink()  # which would say that the weights are others
    with pytest.raises(FloatingPointError, match="the gradient at timestep 0 has the norm nan"):
        measure_affinity(checkpoint, SETTINGS)


def test_cosines_of_rows_that_are_alike_opposed_and_at_right_angles():
    rows = np.array([[1, 2], [-3, -6], [2, -1]], np.float32)
    np.testing.assert_allclose(cosines(rows), [[1, -1, 0], [-1, 1, 0], [0, 0, 1]], atol=1e-7)
