"""The training step: what every weighting does to gradients, whatever parts and workers they are made in."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import (
    BALANCERS,
    SWITCH_DIT,
    WEIGHTINGS,
    Recorder,
    batches_of,
    digits,
    in_workers,
    tiny_config,
    train,
    train_in_parts,
)
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.diffusion.balancers import GradientBalancer, NashMTL
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.training import TrainingDivergedError
from dtr_ray.training.interval_gradients import IntervalGradients, check_memory
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "DiT": {},
    "Switch-DiT": SWITCH_DIT,
    "Switch-DiT, no prior": SWITCH_DIT | {"model__prior_weight": 0.0},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


def fresh_state(config: TrialConfig) -> TrainingState:
    """A model all of whose layers have gradients: at first most of DiT's have none."""
    state = TrainingState.build(config, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in state.model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    state.model.train()
    return state


def make_steps(config: TrialConfig, num_steps: int = 1, state: TrainingState | None = None) -> TrainingState:
    state = state or fresh_state(config)
    batches, step = batches_of(config, state), build_step(config, state, Group())
    for _ in range(num_steps):
        step(batches.at(state.step))
        state.step += 1
    return state


def gradient(state: TrainingState) -> Tensor:
    """The model's gradient of the first step: AdamW's first moment is (1 - beta1) times it then."""
    moments = state.optimizer.state_dict()["state"]
    count = len(list(state.model.parameters()))
    return 10 * torch.cat([moments[number]["exp_avg"].flatten() for number in range(count)])


def gradients_of_one_forward(state: TrainingState, config: TrialConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Each interval's (K, P), and the extra loss's (P,), from the whole batch at once; the batch's counts."""
    batch = batches_of(config, state).at(state.step)
    extra: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        found = state.model(x, t, y)
        if isinstance(found, tuple):
            extra.append(found[1])
            return found[0]
        return found

    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)
    conditions = {"y": batch.conditions}
    losses = diffusion_losses(predict, schedule, batch.x, batch.t, batch.noise, conditions)["loss"]
    weights = list(state.model.parameters())

    def of(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    assert batch.counts is not None
    sums = [losses[batch.cluster == interval].sum() for interval in range(len(batch.counts))]
    means = [of(total / max(count, 1)) for total, count in zip(sums, batch.counts.tolist(), strict=True)]
    return torch.stack(means), of(sum(extra, 0 * losses.sum())), batch.counts


@pytest.mark.parametrize("name", ["ant_pcgrad", "ant_nash"])
@pytest.mark.parametrize(("batch_size", "num_clusters"), [(24, 3), (13, 4), (12, 1), (4, 6)])
def test_intervals_by_themselves_give_the_gradients_of_the_whole_batch(
    name: str, model: dict[str, Any], batch_size: int, num_clusters: int
):
    config = tiny_config(
        **model,
        weighting__name=name,
        weighting__num_clusters=num_clusters,
        training__batch_size=batch_size,
    )
    state = fresh_state(config)
    gradients, extra, counts = gradients_of_one_forward(state, config)
    assert (extra.norm() > 0) == (model == SWITCH_DIT)
    assert int((counts > 0).sum()) == min(batch_size, num_clusters)
    balancer = TrainingState.build(config, CPU).balancer
    assert isinstance(balancer, GradientBalancer)
    exact = gradients.double()
    weights = balancer.weigh(exact @ exact.T, counts, config.training.seed, 0)
    # The extra loss is not balanced: its gradient is added as it is.
    expected = weights @ gradients + extra
    torch.testing.assert_close(gradient(make_steps(config, state=state)), expected, rtol=1e-4, atol=1e-5)


def test_nashmtl_makes_plain_steps_with_the_weights_it_has(model: dict[str, Any]):
    config = tiny_config(
        **model, weighting__name="ant_nash", weighting__num_clusters=3, weighting__every_steps=5
    )
    state = fresh_state(config)
    state.step = 4
    assert isinstance(state.balancer, NashMTL)
    weights = torch.tensor([0.5, 2.0, 1.0])
    state.balancer.weights.copy_(weights)
    gradients, extra, _ = gradients_of_one_forward(state, config)
    make_steps(config, state=state)
    torch.testing.assert_close(gradient(state), weights / 3 @ gradients + extra, rtol=1e-4, atol=1e-5)
    assert torch.equal(state.balancer.weights, weights)
    make_steps(config, state=state)
    assert not torch.equal(state.balancer.weights, weights)


def test_of_one_interval_pcgrad_is_the_plain_step():
    config = tiny_config(weighting__name="ant_pcgrad", weighting__num_clusters=1)
    state = fresh_state(config)
    gradients, _, _ = gradients_of_one_forward(state, config)
    torch.testing.assert_close(gradient(make_steps(config, state=state)), gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("num_parts", [2, 5, 12])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    weighting: str, num_parts: int, model: dict[str, Any]
):
    changes = {**model, "weighting__name": weighting}
    if weighting in BALANCERS:
        changes["weighting__num_clusters"] = 2
    whole = make_steps(tiny_config(**changes))
    parts = make_steps(tiny_config(**changes, training__accumulation_steps=num_parts))
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.pending, whole.pending, rtol=1e-5, atol=0)
    if weighting == "ant_uw":
        assert whole.balancer is not None
        scales = [state.balancer.state_dict()["log_scales"] for state in (parts, whole)]
        torch.testing.assert_close(*scales)


def test_parts_of_a_share_cover_it_and_are_never_empty():
    batch = batches_of(tiny_config(weighting__name="ant_uw"), rank=1, world_size=3).at(0)
    for num_parts, sizes in ((1, [4]), (2, [2, 2]), (3, [1, 1, 2]), (100, [1, 1, 1, 1])):
        parts = list(batch.parts(num_parts))
        assert [len(part) for part in parts] == sizes
        for name in ("x", "conditions", "t", "noise", "cluster"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert all(part.counts is batch.counts for part in parts)


@pytest.mark.parametrize(("batch_size", "num_clusters", "world_size"), [(12, 5, 3), (4, 9, 2), (6, 1, 1)])
def test_spans_are_the_rows_of_each_interval(batch_size: int, num_clusters: int, world_size: int):
    config = tiny_config(
        weighting__name="ant_uw", weighting__num_clusters=num_clusters, training__batch_size=batch_size
    )
    totals = torch.zeros(num_clusters, dtype=torch.int64)
    for rank in range(world_size):
        batch = batches_of(config, rank=rank, world_size=world_size).at(0)
        assert batch.cluster is not None
        assert len(batch.spans) == num_clusters
        for interval, (start, stop) in enumerate(batch.spans):
            assert (batch.cluster[start:stop] == interval).all()
            totals[interval] += stop - start
    assert batch.counts is not None
    assert torch.equal(totals, batch.counts)
    assert batches_of(tiny_config()).at(0).spans == ()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_more_samples_go_through_the_model_at_once_than_accumulation_allows(weighting: str):
    seen: list[int] = []
    clusters = {"weighting__num_clusters": 2} if weighting in BALANCERS else {}
    config = tiny_config(weighting__name=weighting, **clusters, training__accumulation_steps=5)
    state = fresh_state(config)
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    make_steps(config, state=state)
    assert sum(seen) == 12
    assert max(seen) == 3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_bf16_gradients_are_close_to_those_of_fp32(weighting: str, model: dict[str, Any]):
    changes = {**model, "weighting__name": weighting}
    if weighting in BALANCERS:
        changes["weighting__num_clusters"] = 3
    exact, rounded, parts = (
        gradient(make_steps(tiny_config(**changes, **more)))
        for more in (
            {},
            {"training__precision": "bf16"},
            {"training__precision": "bf16", "training__accumulation_steps": 4},
        )
    )
    assert rounded.dtype == torch.float32
    for found in (rounded, parts):
        assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("weighting", "changes"),
    [("vanilla", {}), ("ant_uw", {}), ("ant_pcgrad", {}), ("ant_nash", SWITCH_DIT)],
    ids=["vanilla", "ant_uw", "ant_pcgrad", "ant_nash, Switch-DiT"],
)
def test_a_compiled_model_makes_the_same_gradients(
    weighting: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    # Graphs are traced and differentiated as ever, and then run as they are: compiling them takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    changes = changes | {"weighting__name": weighting, "training__accumulation_steps": 2}
    if weighting in BALANCERS:
        changes["weighting__num_clusters"] = 2
    plain = gradient(make_steps(tiny_config(**changes)))
    compiled = gradient(make_steps(tiny_config(**changes, training__compile=True)))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_average_follows_with_every_weighting(weighting: str):
    state = make_steps(tiny_config(weighting__name=weighting, training__ema_decay=0.75))
    before = fresh_state(tiny_config())
    first = TrainingState.build(tiny_config(), CPU)
    for start, average, new, old in zip(
        first.ema.parameters(),
        state.ema.parameters(),
        state.model.parameters(),
        before.model.parameters(),
        strict=True,
    ):
        assert not torch.equal(old, new)
        torch.testing.assert_close(average, 0.75 * start + 0.25 * new.detach())


def test_several_workers_train_in_parts_as_one_process_does(tmp_path: Path):
    alone = train_in_parts(Group(), tmp_path)
    together = in_workers(train_in_parts, 2, tmp_path)
    for name, (losses, weights) in alone.items():
        for found_losses, found_weights in (results[name] for results in together):
            assert found_losses == pytest.approx(losses, rel=1e-5), name
            # AdamW's first steps are as long where a gradient is nothing but rounding.
            assert (found_weights - weights).norm() < 1e-3 * weights.norm(), name
        assert torch.equal(together[0][name][1], together[1][name][1])


@pytest.mark.parametrize(
    ("weighting", "names"),
    [
        ("vanilla", set()),
        ("ant_uw", {"balancer/weight_0", "balancer/weight_1"}),
        ("ant_pcgrad", {"balancer/conflicts"}),
        ("ant_nash", {"balancer/weight_0", "balancer/weight_1"}),
    ],
)
def test_a_record_tells_what_the_balancer_does(weighting: str, names: set[str], tmp_path: Path):
    clusters = {"weighting__num_clusters": 2} if weighting in BALANCERS else {}
    config = tiny_config(weighting__name=weighting, **clusters)
    seen: list[dict[str, float]] = []

    class Balance(Recorder):
        def metrics(self, step: int, values: dict[str, float]) -> None:
            super().metrics(step, values)
            seen.append({key: value for key, value in values.items() if key.startswith("balancer/")})

    list(train(config, tmp_path, digits(config), observer=Balance()))
    assert [told.keys() for told in seen] == [names] * 3
    assert all(0 <= value < 1e3 for told in seen for value in told.values())


@pytest.mark.parametrize("weighting", ["ant_pcgrad", "ant_nash"])
def test_gradients_that_are_not_finite_fail_the_trial_by_its_loss(weighting: str, tmp_path: Path):
    config = tiny_config(weighting__name=weighting, training__lr=1e20)
    with pytest.raises(TrainingDivergedError, match=r"at step [2-6]"):
        list(train(config, tmp_path, digits(config)))


def test_parameters_that_a_loss_does_not_reach_have_gradients_of_zero():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    buffer = IntervalGradients([used, unused], 2)
    for interval in (0, 1):
        buffer.collect(interval)
        (used.sum() * (interval + 1)).backward()
    torch.testing.assert_close(buffer.sum_over(Group()), torch.tensor([[2.0, 4.0], [4.0, 8.0]]).double())
    buffer.combine(torch.tensor([0.5, 0.25]))
    assert used.grad is not None
    assert unused.grad is not None
    assert used.grad.tolist() == [1, 1]
    assert unused.grad.tolist() == [0, 0]


def test_gradients_larger_than_the_memory_of_the_gpu_are_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**28)
    device = torch.device("cuda")
    check_memory(8, 2**25, device)
    message = r"8 intervals of 41,943,040 parameters need 1\.4 GiB, .* 1\.2 GiB free: .*num_clusters"
    with pytest.raises(ValueError, match=message):
        check_memory(8, 5 * 2**23, device)
    check_memory(8, 2**60, CPU)
