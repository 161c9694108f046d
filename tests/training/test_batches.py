import pytest
import torch
from tiny_trials import WEIGHTINGS, batches_of, digits, tiny_config

from dtr_ray.data import ImageData
from dtr_ray.distributed import Group
from dtr_ray.training.batches import Batches


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_shares_are_the_batch_of_one_process(weighting: str, world_size: int):
    config = tiny_config(weighting__name=weighting, data__horizontal_flip=True)
    whole = batches_of(config).at(7)
    shares = [batches_of(config, rank=rank, world_size=world_size).at(7) for rank in range(world_size)]
    for name in ("x", "conditions", "t", "noise", "cluster"):
        parts = [getattr(share, name) for share in shares]
        if getattr(whole, name) is None:
            assert parts == [None] * world_size
        else:
            assert torch.equal(torch.cat(parts), getattr(whole, name))
    for share in shares:
        assert share.counts is whole.counts is None or torch.equal(share.counts, whole.counts)


def test_a_batch_is_what_its_docstring_says():
    config = tiny_config(weighting__name="ant_uw", training__batch_size=64)
    batch = batches_of(config).at(0)
    assert batch.x.shape == batch.noise.shape == (64, 1, 8, 8)
    assert -1 <= batch.x.min() < batch.x.max() <= 1
    assert batch.t.dtype == batch.conditions.dtype == torch.int64
    assert 0 <= batch.t.min() <= batch.t.max() < 1000
    assert batch.cluster is not None
    assert batch.counts is not None
    assert torch.equal(torch.bincount(batch.cluster, minlength=8), batch.counts)
    assert torch.equal(batch.t * 8 // 1000, batch.cluster)
    batches = batches_of(config)
    dropped = sum((batches.at(step).conditions == 10).sum().item() for step in range(20)) / (20 * 64)
    assert 0.05 < dropped < 0.15


def test_half_of_the_images_are_flipped():
    plain, flipped = (
        batches_of(tiny_config(training__batch_size=600, data__horizontal_flip=flip)).at(0).x
        for flip in (False, True)
    )
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 0.4 < mirrored.float().mean() < 0.6


def test_batches_follow_the_seed_and_the_step():
    config = tiny_config(training__seed=1)
    batch, again = batches_of(config).at(3), batches_of(config).at(3)
    others = [batches_of(config).at(4), batches_of(tiny_config(training__seed=2)).at(3)]
    for name in ("x", "t", "noise"):
        assert torch.equal(getattr(batch, name), getattr(again, name))
        assert not any(torch.equal(getattr(batch, name), getattr(other, name)) for other in others)


def test_labels_are_those_of_the_images_and_none_are_dropped_without_classes():
    config = tiny_config(model__class_dropout_prob=0.0)
    batch = batches_of(config).at(0)
    data = digits(config)
    for x, label in zip(batch.x, batch.conditions, strict=True):
        same = (data.batch(torch.arange(len(data))) == x).flatten(1).all(1)
        assert label in data.labels[same]
    assert batches_of(tiny_config(data__num_classes=1)).at(0).conditions.tolist() == [0] * 12


def test_a_latent_s_posterior_noise_does_not_depend_on_the_number_of_workers():
    # A VAE on disk is another module's business: here the data draws as latents do, and the loop believes it.
    class Latents(ImageData):
        def batch(self, indices, flip=None, generator=None):  # type: ignore[no-untyped-def]
            assert generator is not None
            return torch.randn(len(indices), *config.data.sample_shape, generator=generator)

    config = tiny_config(data__vae="a VAE", data__resolution=32, sampling__clip_denoised=False)
    plain = digits()
    data = Latents(plain.pixels(torch.arange(50)).numpy(), plain.labels[:50], 10, "latents")
    shares = {
        world_size: torch.cat(
            [
                Batches(
                    config, data, Group(rank, world_size), torch.device("cpu"), null_label=10, intervals=None
                )
                .at(2)
                .x
                for rank in range(world_size)
            ]
        )
        for world_size in (1, 2, 3)
    }
    assert torch.equal(shares[2], shares[1])
    assert torch.equal(shares[3], shares[1])
