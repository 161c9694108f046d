"""Balancers: uncertainty weighting against the authors' numbers; what PCGrad and NashMTL weigh how."""

import itertools

import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.config.weighting import (
    MinSNRWeighting,
    NashWeighting,
    P2Weighting,
    PCGradWeighting,
    SNRIntervals,
    UWWeighting,
    VanillaWeighting,
)
from dtr_ray.diffusion.balancers import NashMTL, PCGrad, UncertaintyWeighting, build_balancer
from dtr_ray.diffusion.gradients import gram_matrix, nash_weights, project_conflicting_gradients
from dtr_ray.diffusion.intervals import snr_intervals, stratified_timesteps, uniform_intervals
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule

quick = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_uncertainty_weighting_equals_the_authors(name, golden_dit):
    arrays, settings_ = load("losses")
    model = golden_dit(settings_["model"])
    balancer = build_balancer(UWWeighting(num_clusters=8), noise_schedule(name, 1000))
    scales = torch.tensor(settings_["uw_loss_scale"])
    balancer.load_state_dict({"log_scales": scales})
    losses = diffusion_losses(
        model, noise_schedule(name, 1000), arrays["x_start"], arrays["t"], arrays["noise"], {"y": arrays["y"]}
    )["loss"]
    cluster = torch.arange(16) * 8 // 16
    loss = balancer(losses, cluster, torch.bincount(cluster, minlength=8))
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays[f"{name}_uw_loss"], rtol=5e-5, atol=0)
    expected = torch.tensor(settings_[f"{name}_uw_grad_loss_scale"])
    torch.testing.assert_close(balancer.log_scales.grad, expected, rtol=1e-4, atol=0)
    parameters = dict(model.named_parameters())
    for parameter in ("final_layer.linear.weight", "blocks.1.mlp.fc1.weight"):
        norm = parameters[parameter].grad.double().norm().item()
        assert norm == pytest.approx(settings_[f"{name}_uw_gradnorm_{parameter}"], rel=1e-4)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_the_mean_over_workers_is_the_whole_batch(world_size, share, num_clusters, seed):
    batch_size = world_size * share
    generator = torch.Generator().manual_seed(seed)
    balancer = UncertaintyWeighting(uniform_intervals(1000, num_clusters)).double()
    balancer.load_state_dict({"log_scales": torch.randn(num_clusters, generator=generator)})
    losses = torch.rand(batch_size, generator=generator)
    _, cluster = stratified_timesteps(balancer.intervals, batch_size, generator)
    counts = torch.bincount(cluster, minlength=num_clusters)

    def run(parts):
        whole = losses.clone().requires_grad_()
        balancer.zero_grad()
        scalars = [
            balancer(whole[part], cluster[part], counts, world_size=len(parts)) / len(parts) for part in parts
        ]
        torch.stack(scalars).sum().backward()
        return sum(s.item() for s in scalars), whole.grad, balancer.log_scales.grad

    alone = run([slice(0, batch_size)])
    together = run([slice(r * share, (r + 1) * share) for r in range(world_size)])
    assert together[0] == pytest.approx(alone[0], rel=1e-9)
    torch.testing.assert_close(together[1:], alone[1:], rtol=1e-6, atol=1e-12)


def test_a_cluster_without_samples_counts_for_nothing():
    balancer = UncertaintyWeighting(uniform_intervals(10, 3))
    # exp(200) is infinite in float32: it must not turn into NaN, nor the scale be moved.
    balancer.load_state_dict({"log_scales": torch.tensor([0.5, -200.0, 0.0])})
    loss = balancer(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), torch.tensor([1, 0, 1]))
    loss.backward()
    expected = 0.5 * (torch.tensor(-0.5).exp() * 1.0 / 3 + 0.5) + 0.5 * (2.0 / 3)
    torch.testing.assert_close(loss.detach(), expected)
    assert balancer.log_scales.grad[1] == 0
    assert balancer.log_scales.grad.isfinite().all()


def test_a_worker_without_samples_adds_its_share_of_the_scales():
    balancer = UncertaintyWeighting(uniform_intervals(10, 2))
    balancer.load_state_dict({"log_scales": torch.tensor([0.5, 0.25])})
    empty = torch.zeros(0)
    assert balancer(empty, empty.long(), torch.tensor([1, 1]), world_size=2).item() == pytest.approx(0.375)


def test_scales_settle_where_each_interval_counts_one():
    balancer = UncertaintyWeighting(uniform_intervals(10, 2))
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=0.025, weight_decay=0.0)
    losses, cluster, counts = torch.tensor([4.0, 0.5]), torch.tensor([0, 1]), torch.tensor([1, 1])
    for _ in range(600):
        optimizer.zero_grad()
        balancer(losses, cluster, counts).backward()
        optimizer.step()
    torch.testing.assert_close(balancer.log_scales.detach(), (losses / 2).log(), rtol=0, atol=1e-2)


def test_a_part_of_the_samples_adds_its_share_of_the_scales():
    balancer = UncertaintyWeighting(uniform_intervals(10, 2))
    balancer.load_state_dict({"log_scales": torch.tensor([0.5, 0.25])})
    losses, cluster, counts = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    whole = balancer(losses, cluster, counts)
    parts = [
        balancer(losses[part], cluster[part], counts, share=share)
        for part, share in ((slice(0, 2), 2 / 3), (slice(2, 3), 1 / 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_weight_of_an_interval_is_told_as_a_factor_of_its_plain_loss():
    balancer = UncertaintyWeighting(uniform_intervals(10, 2))
    balancer.load_state_dict({"log_scales": torch.tensor([0.0, 1.0])})
    assert balancer.metrics() == {
        "balancer/weight_0": 0.5,
        "balancer/weight_1": pytest.approx(0.5 * torch.tensor(-1.0).exp().item()),
    }


def some_gradients(num: int, size: int = 6) -> torch.Tensor:
    return torch.randn(num, size, generator=torch.Generator().manual_seed(1))


def test_pcgrad_is_the_mean_of_the_projected_gradients_in_orders_of_the_seed_and_step():
    balancer = PCGrad(uniform_intervals(10, 3))
    gradients = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 0.5, 0.3], [-0.3, -1.0, 0.4]])
    gram, counts = gram_matrix(gradients), torch.tensor([2, 2, 2])

    def combined(seed: int, step: int) -> torch.Tensor:
        return balancer.weigh(gram, counts, seed, step) @ gradients

    choices = list(itertools.product(itertools.permutations(range(3)), repeat=3))
    possible = torch.stack([project_conflicting_gradients(gradients, orders) / 3 for orders in choices])
    found = torch.stack([combined(seed, step) for seed in range(3) for step in range(10)])
    assert (found[:, None] - possible).norm(dim=2).min(1).values.max() < 1e-5
    assert len(found.unique(dim=0)) > 5
    assert torch.equal(combined(1, 2), combined(1, 2))


def test_pcgrad_without_a_conflict_is_the_mean_of_the_gradients_with_samples():
    balancer = PCGrad(uniform_intervals(10, 4))
    gradients = some_gradients(4).abs()
    gradients[1] = 0
    counts = torch.tensor([1, 0, 1, 1])
    weights = balancer.weigh(gram_matrix(gradients), counts, 0, 0)
    torch.testing.assert_close(weights @ gradients, gradients.sum(0) / 3)
    assert balancer.metrics() == {"balancer/conflicts": 0}


def test_pcgrad_tells_the_share_of_pairs_that_conflict():
    balancer = PCGrad(uniform_intervals(10, 4))
    assert balancer.metrics() == {}
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0], [0.0, 1.0]])
    balancer.weigh(gram_matrix(gradients), torch.tensor([1, 1, 0, 1]), 0, 0)
    assert balancer.metrics() == {"balancer/conflicts": pytest.approx(1 / 3)}


def test_nashmtl_is_the_mean_of_the_weighted_gradients():
    balancer, gradients = NashMTL(uniform_intervals(10, 4)), some_gradients(4)
    gram = gram_matrix(gradients)
    weights = balancer.weigh(gram, torch.tensor([3, 2, 3, 2]), 0, 0)
    torch.testing.assert_close(weights.double(), nash_weights(gram) / 4, rtol=1e-6, atol=0)
    assert (weights @ gradients).norm().item() == pytest.approx(0.5)
    assert balancer.plain_weights(0, torch.ones(4)) is None
    assert balancer.metrics() == {f"balancer/weight_{g}": 4 * weights[g].item() for g in range(4)}


def test_nashmtl_keeps_its_weights_until_new_ones_are_due():
    balancer, gradients = NashMTL(uniform_intervals(10, 3), every_steps=3), some_gradients(3)
    gradients[1] = 0
    counts = torch.tensor([1, 0, 1])
    weights = balancer.weigh(gram_matrix(gradients), counts, 0, 0)
    assert weights[1] == 0
    assert [balancer.plain_weights(step, counts) is None for step in range(7)] == [
        step % 3 == 0 for step in range(7)
    ]
    torch.testing.assert_close(balancer.plain_weights(1, counts), weights)
    # The interval without a sample then counts as the mean of the others when it has some.
    first, _, last = (2 * weights).tolist()
    expected = torch.tensor([first, (first + last) / 2, last]) / 3
    torch.testing.assert_close(balancer.plain_weights(2, torch.tensor([1, 1, 1])), expected)
    copy = NashMTL(uniform_intervals(10, 3), every_steps=3)
    copy.load_state_dict(balancer.state_dict())
    assert torch.equal(copy.plain_weights(1, counts), balancer.plain_weights(1, counts))


def test_nashmtl_leaves_it_to_the_loss_to_tell_of_gradients_that_are_not_finite():
    balancer = NashMTL(uniform_intervals(10, 2))
    weights = balancer.weigh(torch.full((2, 2), torch.nan).double(), torch.tensor([1, 1]), 0, 0)
    assert weights.tolist() == [0.5, 0.5]


def test_a_weight_times_its_gradient_never_overflows():
    balancer = NashMTL(uniform_intervals(10, 2))
    gram = torch.diag(torch.tensor([1e-90, 1.0], dtype=torch.float64))
    assert balancer.weigh(gram, torch.tensor([1, 1]), 0, 0).isfinite().all()


def test_balancers_are_those_of_the_configuration_over_its_intervals():
    schedule = noise_schedule("cosine", 10)
    for config in (VanillaWeighting(), MinSNRWeighting(), P2Weighting()):
        assert build_balancer(config, schedule) is None
    balancer = build_balancer(UWWeighting(num_clusters=3), schedule)
    assert balancer.intervals == [(0, 3), (3, 6), (6, 10)]
    assert [p.shape for p in balancer.parameters()] == [(3,)]
    snr = SNRIntervals()
    pcgrad = build_balancer(PCGradWeighting(num_clusters=3, intervals=snr), schedule)
    assert isinstance(pcgrad, PCGrad)
    assert pcgrad.intervals == snr_intervals(schedule.snr, 3)
    nash = build_balancer(NashWeighting(num_clusters=2, every_steps=7), schedule)
    assert isinstance(nash, NashMTL)
    assert (nash.every_steps, nash.intervals) == (7, [(0, 5), (5, 10)])
    assert [list(balancer.parameters()) for balancer in (pcgrad, nash)] == [[], []]
    with pytest.raises(ValueError, match="num_clusters is 11"):
        build_balancer(UWWeighting(num_clusters=11), schedule)
