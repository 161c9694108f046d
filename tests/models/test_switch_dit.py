"""Switch-DiT: against the authors' gates, masks, outputs, prior loss and gradients, and what it keeps to."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays

from dtr_ray.models import build_model
from dtr_ray.models.prior import (
    Matching,
    diffusion_prior_loss,
    jensen_shannon,
    matching_costs,
    prior_mask,
)
from dtr_ray.models.switch_dit import SwitchDiT

CASES = ["cond_E3k2_s002", "cond_E3k2_s02", "uncond_E3k2_s02", "cond_E4k2_s02"]
SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
    "num_timesteps": 50,
}


class Golden:
    """A golden case: its numbers, and the models that must give them."""

    def __init__(self, name, golden, golden_weights):
        self.meta, arrays = golden("switchdit")
        self.name, self._weights = name, golden_weights
        self.case = next(case for case in self.meta["cases"] if case["name"] == name)
        self.arrays = {key: torch.from_numpy(value) for key, value in arrays.items()}
        self.x, self.t = self.arrays["x"], self.arrays["t"]

    def __getitem__(self, key):
        return self.arrays[f"{self.name}_{key}"]

    def model(self, state_dict, class_dropout_prob):
        meta, case = self.meta, self.case
        model = SwitchDiT(
            8, 2, 4, meta["hidden"], meta["depth"], meta["heads"], case["num_classes"],
            num_experts=case["num_experts"], top_k=case["k"], prior_weight=case["train_w_JSD"],
            class_dropout_prob=class_dropout_prob,
        )  # fmt: skip
        # `full_time` and `prior._unit_mapping` are among them.
        model.load_state_dict(self._weights(case | {"state_dict": case[state_dict]}, meta["seed"]))
        return model

    def eval_model(self):
        return self.model("state_dict", self.case["class_dropout_prob_eval"]).eval()

    def train_model(self):
        return self.model("train_state_dict", 0.0)


@pytest.fixture(scope="module", params=CASES)
def case(request, golden, golden_weights):
    return Golden(request.param, golden, golden_weights)


def assert_close(actual, expected):
    """Within the golden file's tolerance: relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


@torch.no_grad()
def test_outputs_and_soft_masks_are_the_authors(case):
    model, masks = case.eval_model(), []
    for router in model.routers:
        router.register_forward_hook(lambda module, arguments, route: masks.append(route.on))
    assert_close(model(case.x, case.t, torch.tensor(case.case["y_used"])), case["out"])
    for block, mask in enumerate(masks):
        assert_close(mask, case[f"blk{block}_soft_mask"])


@torch.no_grad()
def test_gates_and_choices_at_all_timesteps_are_the_authors(case):
    model = case.eval_model()
    probabilities, _ = model.gates(case.t)
    _, chosen = model.gates(torch.arange(1000))
    for block in range(case.meta["depth"]):
        expected = case[f"blk{block}_gate_probs"]
        torch.testing.assert_close(probabilities[:, block], expected, rtol=0, atol=1e-5)
        assert torch.equal(chosen[:, block], case[f"blk{block}_topk_onehot_all_t"].float())


def test_the_prior_is_the_authors(case):
    prior = case.eval_model().prior
    channel = torch.arange(prior.shape[1])
    start, width = case["prior_start"][:, None], case["prior_width"][:, None]
    assert torch.equal(prior, (channel >= start) & (channel < start + width))


@torch.no_grad()
def test_matching_costs_and_the_matching_are_the_authors(case):
    model = case.train_model()
    _, chosen = model.gates(torch.arange(1000))
    costs = matching_costs(chosen.flatten(1), model.prior)
    assert torch.equal(costs, case["train_match_cost"])
    columns = Matching(costs).columns()
    assert sorted(columns.tolist()) == list(range(len(costs)))
    assert costs[torch.arange(len(costs)), columns].sum().item() == case.case["train_match_total_cost"]
    # Where several matchings cost the least, ours need not be theirs; with their scipy it is.
    ours, theirs = (model.prior[case.t][:, order] for order in (columns, case["train_prior_idx"]))
    probabilities, _ = model.gates(case.t)
    losses = [diffusion_prior_loss(probabilities, rows).item() for rows in (ours, theirs)]
    assert losses[1] == pytest.approx(case.case["train_aux_loss_identity_perm"], abs=2e-6)
    if case.case["weight_scale"] == 0.2:
        assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_training_outputs_prior_loss_and_gradients_are_the_authors(case):
    model = case.train_model()
    output, prior_loss = model(case.x, case.t, case["train_y"])
    assert_close(output.detach(), case["train_out"])
    assert prior_loss.item() == pytest.approx(case.case["train_aux_loss_identity_perm"], abs=2e-6)
    assert prior_loss.item() == pytest.approx(model.prior_loss(case.t).item(), abs=1e-7)
    probabilities, _ = model.gates(case.t)
    torch.testing.assert_close(probabilities.flatten(1), case["train_gate_probs_concat"], rtol=0, atol=1e-5)
    loss = output.square().mean() + prior_loss
    assert loss.item() == pytest.approx(case.case["train_total_mean_out_sq_plus_aux"], rel=1e-5)
    loss.backward()
    norms = {name: weight.grad.double().norm().item() for name, weight in model.named_parameters()}
    assert norms == pytest.approx(case.case["train_grad_l2_norm"], rel=1e-3)


def test_the_prior_losses_gradient_is_the_authors(case):
    model = case.train_model()
    model.prior_loss(case.t).backward()
    for part in ("weight", "bias"):
        norm = model.routers[0].get_parameter(f"f_gate.1.{part}").grad.double().norm().item()
        assert norm == pytest.approx(case.case[f"train_aux_gradnorm_routers.0.f_gate.1.{part}"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "count"),
    [("S", 38_201_156), ("B", 151_604_804), ("L", 533_485_672), ("XL", 786_505_076)],
)
def test_the_gates_and_experts_are_all_that_is_added_to_a_dit(name, count):
    with torch.device("meta"):
        dit, switch = (build_model({"name": f"{family}-{name}/2"}) for family in ("DiT", "Switch-DiT"))
    depth, width = len(switch.blocks), switch.hidden_size
    added = depth * 3 * (width * width + width + width + 1)
    counts = [sum(p.numel() for p in model.parameters()) for model in (dit, switch)]
    assert counts[1] == counts[0] + added == count


def inputs(batch_size=6, num_timesteps=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 4, 8, 8, generator=generator)
    t = torch.randint(num_timesteps, (batch_size,), generator=generator)
    return x, t, torch.randint(5, (batch_size,), generator=generator)


def filled(**changes):
    """A small model whose weights, the zeros of its start included, are random."""
    model = SwitchDiT(**SIZES | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def test_a_new_model_routes_nothing_yet_and_predicts_zero():
    torch.manual_seed(0)
    model = SwitchDiT(**SIZES)
    x, t, y = inputs()
    assert not model.eval()(x, t, y).any()
    route = model.routers[0](torch.randn(6, 16, 32), torch.rand(6, 3))
    assert torch.equal(route.on, torch.ones(6, 16, 32))
    assert not route.off.any()
    assert all(router.get_parameter("f_gate.1.weight").any() for router in model.routers)


def test_in_evaluation_the_output_comes_alone_and_equals_that_of_training():
    model = filled()
    x, t, y = inputs()
    output, prior_loss = model.train()(x, t, y)
    assert (prior_loss.shape, prior_loss.dtype) == ((), torch.float32)
    assert torch.equal(model.eval()(x, t, y), output)


def test_the_prior_weight_is_a_factor_and_zero_does_no_work(monkeypatch):
    x, t, y = inputs()
    one, three, none = (filled(prior_weight=weight) for weight in (1.0, 3.0, 0.0))
    assert three(x, t, y)[1].item() == pytest.approx(3 * one(x, t, y)[1].item())
    monkeypatch.setattr(Matching, "columns", None)
    output, prior_loss = none(x, t, y)
    assert prior_loss.item() == 0
    (output.square().mean() + prior_loss).backward()
    assert all(weight.grad is not None for weight in none.parameters())


@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 2), (4, 1), (2, 2), (1, 1)])
def test_it_is_the_sum_of_the_chosen_experts(num_experts, top_k):
    model = filled(num_experts=num_experts, top_k=top_k)
    x, t, _ = inputs()
    tokens = torch.randn(len(x), 16, 32, generator=torch.Generator().manual_seed(2))
    probabilities, chosen = model.gates(t)
    assert torch.equal(chosen.sum(2), torch.full((6, 2), float(top_k)))
    router = model.routers[1]
    route = router(tokens, (probabilities * chosen)[:, 1])
    for b, x_b in enumerate(tokens):
        mask = torch.ones(16, 32)
        for e in probabilities[b, 1].topk(top_k).indices:
            mask = mask + probabilities[b, 1, e] * (x_b @ router.experts.w[e] + router.experts.b[e])
        torch.testing.assert_close(route.on[b], mask)
        torch.testing.assert_close(route.off[b], 1 - mask, atol=1e-5, rtol=1e-5)


def test_experts_that_no_sample_chose_have_gradients_of_zero():
    model = filled()
    x, t, y = inputs(batch_size=1)
    model(x, t, y)[0].square().mean().backward()
    _, chosen = model.gates(t)
    for router, on in zip(model.routers, chosen[0], strict=True):
        used = router.experts.w.grad.flatten(1).any(1)
        assert torch.equal(used, on.bool())


def test_each_sample_is_routed_by_its_own_timestep():
    model = filled().eval()
    x, t, y = inputs()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model(x, t, y), alone, rtol=1e-5, atol=1e-5)


def test_one_timestep_expanded_is_the_same_as_one_repeated():
    model = filled()
    x, _, y = inputs()
    expanded, repeated = torch.tensor([7]).expand(6), torch.full((6,), 7)
    for mode in (True, False):
        model.train(mode)
        for one, other in zip(model(x, expanded, y), model(x, repeated, y), strict=True):
            torch.testing.assert_close(one, other)


def test_new_weights_are_seen_at_once_in_evaluation_mode():
    model, other = filled().eval(), SwitchDiT(**SIZES)
    x, t, y = inputs()
    before = model(x, t, y)
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)
    after = model(x, t, y)
    assert not torch.allclose(before, after)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x, t, y), after)


def test_the_state_dict_has_the_authors_keys_and_no_tables(case):
    keys = {entry["key"] for entry in case.case["state_dict"] if entry["filled"]}
    assert case.eval_model().state_dict().keys() == keys | {"pos_embed"}


def test_under_bf16_autocast_the_choices_and_the_prior_loss_stay():
    model = filled()
    x, t, y = inputs()
    exact, exact_loss = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, loss = model(x, t, y)
        probabilities, _ = model.gates(t)
    assert (output.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert torch.equal(probabilities, model.gates(t)[0])
    assert loss.item() == exact_loss.item()
    assert (output - exact).norm() < 0.02 * exact.norm()
    (output.square().mean() + loss).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_runs_in_other_precisions(dtype):
    model = filled()
    x, t, y = inputs()
    exact, _ = model(x, t, y)
    output, loss = model.to(dtype)(x.to(dtype), t, y)
    assert (output.dtype, loss.dtype) == (dtype, torch.float32)
    assert (output.float() - exact).norm() < (1e-5 if dtype == torch.float64 else 0.05) * exact.norm()


def test_in_evaluation_it_compiles_as_one_graph():
    model = filled().eval()
    x, t, y = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


def test_compiled_it_trains_with_the_same_gradients():
    model, twin = filled(), filled()
    x, t, y = inputs()
    for module, run in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
        output, loss = run(x, t, y)
        (output.square().mean() + loss).backward()
        assert module.training
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_it_draws_nothing_at_random_and_a_copy_gives_the_same():
    model = filled()
    x, t, y = inputs()
    state = torch.get_rng_state()
    (output, loss), (again, loss_again) = model(x, t, y), copy.deepcopy(model)(x, t, y)
    assert torch.equal(output, again)
    assert torch.equal(loss, loss_again)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 4}, "top_k is 4: it must be from 1 to num_experts 3"),
        ({"top_k": 0}, "top_k is 0"),
        ({"prior_weight": -1.0}, "prior_weight is -1.0: it must be 0 or above"),
        ({"num_timesteps": 1}, "num_timesteps is 1"),
        ({"num_heads": 5}, "hidden_size is 32: it must be a multiple of num_heads 5"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        SwitchDiT(**SIZES | change)


def test_inputs_of_another_shape_and_timesteps_outside_are_refused():
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"t has shape \(5,\)"):
        filled()(x, t[:5], y)
    with pytest.raises(IndexError):
        filled()(x, t - 50, y)


def test_a_routing_beside_the_experts_is_refused():
    with pytest.raises(ValueError, match="Switch-DiT-T/4 routes by its experts"):
        build_model({"name": "Switch-DiT-T/4"}, {"name": "dtr"})
    assert build_model({"name": "Switch-DiT-T/4"}, {"name": "none"}, 20).num_timesteps == 20


# The prior and the matching, each alone.


@pytest.mark.parametrize(("depth", "num_experts"), list(itertools.product((1, 3, 28), (1, 2, 3, 7, 49))))
def test_the_prior_has_as_many_on_as_the_blocks_choose(depth, num_experts):
    for top_k in range(1, num_experts + 1):
        prior = prior_mask(50, depth, num_experts, top_k)
        assert torch.equal(prior.sum(1), torch.full((50,), depth * top_k))


bits = st.integers(1, 6).flatmap(lambda m: np_arrays(bool, (8, m)))


@given(bits, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_costs_are_the_distances_and_the_matching_is_the_cheapest(chosen, random):
    prior = chosen.copy()
    random.shuffle(prior)
    costs = matching_costs(torch.from_numpy(chosen).float(), torch.from_numpy(prior))
    expected = np.abs(chosen.astype(int)[:, :, None] - prior.astype(int)[:, None, :]).sum(0)
    np.testing.assert_array_equal(costs.numpy(), expected)
    columns = Matching(costs).columns().numpy()
    rows = np.arange(len(expected))
    best = min(expected[rows, list(order)].sum() for order in itertools.permutations(rows))
    assert expected[rows, columns].sum() == best


def test_the_divergence_is_symmetric_and_from_zero_to_log_two():
    p, q = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.25, 0.75]])
    assert jensen_shannon(p, q).item() == pytest.approx(np.log(2), abs=1e-4)
    assert jensen_shannon(p, p).item() == pytest.approx(0, abs=1e-6)
    middle = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert jensen_shannon(p, middle).item() == pytest.approx(jensen_shannon(middle, p).item())


def test_training_on_the_prior_loss_alone_brings_the_gates_to_the_prior():
    torch.manual_seed(0)
    model = SwitchDiT(**SIZES | {"depth": 4})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    t = torch.arange(50)
    first = model.prior_loss(t).item()
    for _ in range(60):
        loss = model.prior_loss(t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
