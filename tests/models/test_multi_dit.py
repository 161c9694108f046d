"""The multi-expert baseline: which expert serves which timestep, and its size."""

import pytest
import torch

from dtr_ray.bounds import uniform_bounds
from dtr_ray.models import build_model
from dtr_ray.models.dit import DiT
from dtr_ray.models.multi_dit import MultiDiT
from dtr_ray.models.routing import dtr_mask

SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


def filled(num_experts=3, num_timesteps=50, **changes):
    """A small model whose weights, the zeros of its start included, are random."""
    model = MultiDiT(num_experts=num_experts, num_timesteps=num_timesteps, **SIZES | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def inputs(batch_size=8, num_timesteps=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 4, 8, 8, generator=generator)
    t = torch.randint(num_timesteps, (batch_size,), generator=generator)
    return x, t, torch.randint(5, (batch_size,), generator=generator)


@pytest.mark.parametrize("mask", [None, dtr_mask(50, 32, 1.0, 0.5)])
def test_each_sample_is_served_by_the_expert_of_its_interval(mask):
    model = filled(mask=mask)
    x, t, y = inputs()
    assert model.bounds == uniform_bounds(50, 3) == [(0, 16), (16, 33), (33, 50)]
    owners = [next(i for i, (start, stop) in enumerate(model.bounds) if start <= time < stop) for time in t]
    assert set(owners) == {0, 1, 2}
    for mode in (True, False):
        out = model.train(mode)(x, t, y)
        for i, owner in enumerate(owners):
            alone = model.experts[owner](x[i : i + 1], t[i : i + 1], y[i : i + 1])
            torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, 15, 16, 32, 33, 49])
def test_at_one_timestep_for_all_one_expert_runs_as_it_does_alone(t):
    model = filled().eval()
    x, _, y = inputs()
    ran = []
    for i, expert in enumerate(model.experts):
        expert.register_forward_hook(lambda module, arguments, out, i=i: ran.append(i))
    out = model(x, torch.tensor(t).expand(8), y)
    (owner,) = ran
    assert model.bounds[owner][0] <= t < model.bounds[owner][1]
    repeated = torch.full((8,), t)
    assert torch.equal(out, model.experts[owner](x, repeated, y))
    torch.testing.assert_close(model(x, repeated, y), out)


def test_every_expert_has_the_mask():
    mask = dtr_mask(50, 32, 4.0, 0.8)
    plain, routed = filled(), filled(mask=mask)
    routed.load_state_dict(plain.state_dict())
    x, t, y = inputs()
    assert plain.state_dict().keys() == routed.state_dict().keys()
    assert not torch.allclose(plain(x, t, y), routed(x, t, y))
    with pytest.raises(ValueError, match="mask has 50 rows: num_timesteps 60 are needed"):
        filled(num_timesteps=60, mask=mask)


def test_experts_without_a_sample_have_gradients_of_zero_and_evaluation_touches_none():
    model = filled()
    x, _, y = inputs()
    model(x, torch.arange(8), y).square().mean().backward()
    norms = [sum(p.grad.norm().item() for p in expert.parameters()) for expert in model.experts]
    assert norms[0] > 0
    assert norms[1:] == [0, 0]
    model.experts[2].final_layer.linear.bias.data.fill_(torch.nan)
    assert model.eval()(x, torch.arange(8), y).isfinite().all()


def test_experts_begin_with_weights_of_their_own():
    first, second, _ = MultiDiT(num_experts=3, **SIZES).experts
    assert not torch.equal(first.x_embedder.proj.weight, second.x_embedder.proj.weight)


def test_one_expert_is_a_dit():
    model, dit = filled(num_experts=1), DiT(**SIZES)
    dit.load_state_dict({key.removeprefix("experts.0."): v for key, v in model.state_dict().items()})
    x, t, y = inputs()
    torch.testing.assert_close(model(x, t, y), dit(x, t, y))
    assert (model.null_label, model.num_classes, model.in_channels, model.out_channels, model.input_size) == (
        5, 5, 4, 8, 8,
    )  # fmt: skip


def test_four_experts_of_size_b_have_the_papers_parameters():
    with torch.device("meta"):
        model = build_model({"name": "Multi-DiT-B/2"})
        one = build_model({"name": "DiT-B/2"})
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, one)]
    assert counts[0] == 4 * counts[1]
    assert round(counts[0] / 1e6) == 521


def test_compiled_it_trains_with_the_same_gradients():
    model, twin = (filled(num_experts=2, depth=1) for _ in range(2))
    for t in (torch.arange(8) + 20, torch.arange(8) + 30):
        x, _, y = inputs()
        for module, run in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
            module.zero_grad()
            run(x, t, y).square().mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_wrong_inputs_are_refused():
    x, t, y = inputs()
    for wrong in (t - 50, t + 50, torch.tensor(50).expand(8), torch.tensor(-1).expand(8)):
        with pytest.raises(IndexError):
            filled()(x, wrong, y)
    with pytest.raises(ValueError, match=r"t has shape \(7,\)"):
        filled()(x, t[:7], y)
    with pytest.raises(ValueError, match="num_clusters is 60"):
        filled(num_experts=60)
