"""Uncertainty weighting against the authors' numbers, over any number of workers."""

import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.config.weighting import MinSNRWeighting, P2Weighting, UWWeighting, VanillaWeighting
from dtr_ray.diffusion.balancers import UncertaintyWeighting, build_balancer
from dtr_ray.diffusion.intervals import stratified_timesteps, uniform_intervals
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule

quick = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_uncertainty_weighting_equals_the_authors(name, golden_dit):
    arrays, settings_ = load("losses")
    model = golden_dit(settings_["model"])
    balancer = build_balancer(UWWeighting(num_clusters=8), 1000)
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


def test_only_uncertainty_weighting_balances_while_training():
    for config in (VanillaWeighting(), MinSNRWeighting(), P2Weighting()):
        assert build_balancer(config, 1000) is None
    balancer = build_balancer(UWWeighting(num_clusters=3), 10)
    assert balancer.intervals == [(0, 3), (3, 6), (6, 10)]
    assert [p.shape for p in balancer.parameters()] == [(3,)]
    with pytest.raises(ValueError, match="num_clusters is 11"):
        build_balancer(UWWeighting(num_clusters=11), 10)
