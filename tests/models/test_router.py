"""From routing configurations to masks, and masks as a part of models: what every routing keeps to."""

import copy
import itertools

import pytest
import torch
from golden import fill_weights
from pydantic import TypeAdapter

from dtr_ray.config import RoutingConfig
from dtr_ray.models import build_model, set_step
from dtr_ray.models.channel_mask import ChannelMask
from dtr_ray.models.dit import DiT
from dtr_ray.models.multi_dit import MultiDiT
from dtr_ray.models.router import _RULES, Router
from dtr_ray.models.routing import (
    clustered_mask,
    dtr_mask,
    explicit_clustered_mask,
    max_roaming_mask,
    random_mask,
)

T, C, BLOCKS = 50, 32, 3
SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": C, "depth": BLOCKS}
SIZES |= {"num_heads": 4, "num_classes": 5}
MODEL = {"name": "DiT", **SIZES}
ROAMING = {"name": "max_roaming", "beta": 0.5, "every_steps": 10, "seed": 3}
OVER_TRAINING = {
    "name": "scheduled",
    "over": "training",
    "alpha": 1.0,
    "last_alpha": 8.0,
    "beta": 1.0,
    "last_beta": 0.5,
    "last_step": 25,
    "every_steps": 10,
}
OVER_BLOCKS = OVER_TRAINING | {"over": "blocks"}

ROUTINGS = {
    "none": {"name": "none"},
    "dtr": {"name": "dtr"},
    "equation": {"name": "dtr", "rule": "equation", "alpha": 2.0},
    "random": {"name": "random"},
    "max_roaming": ROAMING,
    "clustered": {"name": "clustered"},
    "explicit_clustered": {"name": "explicit_clustered"},
    "over training": OVER_TRAINING,
    "over blocks": OVER_BLOCKS,
}
ALL_ON = {
    "dtr": {"name": "dtr", "beta": 1.0},
    "equation": {"name": "dtr", "beta": 1.0, "rule": "equation"},
    "random": {"name": "random", "beta": 1.0},
    "max_roaming": {"name": "max_roaming", "beta": 1.0},
    "clustered": {"name": "clustered", "beta": 1.0},
    "explicit_clustered": {"name": "explicit_clustered", "num_clusters": 1},
    "over training": OVER_TRAINING | {"last_beta": 1.0},
    "over blocks": OVER_BLOCKS | {"last_beta": 1.0},
}


def config(values):
    return TypeAdapter(RoutingConfig).validate_python(values)


def router(values):
    return Router(config(values), T)


def model_of(routing, family="DiT"):
    """A model whose blocks do something, unlike a new one's."""
    model = build_model(MODEL | {"name": family}, routing, T)
    model.load_state_dict(fill_weights(model.state_dict(), 5, 0.2), strict=False)
    return model


def inputs(batch_size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 4, 8, 8, generator=generator)
    return x, torch.randint(T, (batch_size,), generator=generator), torch.arange(batch_size) % 5


@pytest.fixture(params=ROUTINGS)
def routing(request):
    return ROUTINGS[request.param]


def test_every_name_of_a_routing_configuration_is_tested_here_and_has_its_rule():
    schema = TypeAdapter(RoutingConfig).json_schema()
    names = set(schema["discriminator"]["mapping"])
    assert names == {values["name"] for values in ROUTINGS.values()} == {"none", *_RULES}


def test_masks_are_bool_with_a_row_a_timestep_and_a_channel_on_in_each(routing):
    for step in (0, 7, 10, 400):
        mask = router(routing).mask(C, step, BLOCKS)
        if routing["name"] == "none":
            assert mask is None
            continue
        assert mask.dtype == torch.bool
        assert mask.device.type == "cpu"
        assert mask.shape == ((BLOCKS, T, C) if routing is OVER_BLOCKS else (T, C))
        assert mask.any(dim=-1).all()


def test_masks_are_pure_functions_and_draw_nothing_from_the_global_generator(routing):
    state = torch.get_rng_state()
    first = router(routing).mask(C, 130, BLOCKS)
    router(routing).mask(C, 20, BLOCKS)
    second = router(copy.deepcopy(routing)).mask(C, 130, BLOCKS)
    assert first is second is None or torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_what_comes_out_may_be_written_to(routing):
    expected = router(routing).mask(C, 3, BLOCKS)
    if expected is None:
        return
    kept = expected.clone()
    expected.logical_not_()
    assert torch.equal(router(routing).mask(C, 3, BLOCKS), kept)


def test_masks_change_at_the_steps_that_the_router_names_and_at_no_others(routing):
    maker = router(routing)
    assert maker.changes == (routing in (ROAMING, OVER_TRAINING))
    assert maker.made_at(0) == 0
    masks = [maker.mask(C, step, BLOCKS) for step in range(60)]
    for step, (before, after) in enumerate(itertools.pairwise(masks), 1):
        named = maker.made_at(step) != maker.made_at(step - 1)
        same = before is after is None or torch.equal(before, after)
        assert same != named
        if named:
            assert maker.made_at(step) == step


def test_every_routing_trains_and_samples_through_a_transformer(routing):
    model = model_of(routing)
    out = model(*inputs())
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.state_dict().keys() == model_of(None).state_dict().keys()
    assert sum(weight.numel() for weight in model.parameters()) == sum(
        weight.numel() for weight in model_of(None).parameters()
    )
    if routing["name"] != "none":
        set_step(model, 1000)  # schedules begin with all channels on
        assert not torch.equal(model(*inputs()), model_of(None)(*inputs()))


@pytest.mark.parametrize("name", ALL_ON)
def test_all_channels_on_equals_no_routing_bit_for_bit(name):
    models = [model_of(ALL_ON[name]), model_of(None)]
    for model in models:
        set_step(model, 137)
        model(*inputs()).square().mean().backward()
    assert torch.equal(*(model(*inputs()) for model in models))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "none"}, None),
        ({"name": "dtr", "alpha": 2, "beta": 0.5}, dtr_mask(20, 16, 2.0, 0.5)),
        (
            {"name": "dtr", "alpha": 2, "beta": 0.5, "rule": "equation"},
            dtr_mask(20, 16, 2.0, 0.5, "equation"),
        ),
        ({"name": "random", "beta": 0.5, "seed": 7}, random_mask(20, 16, 0.5, 7)),
        (ROAMING, max_roaming_mask(20, 16, 0.5, 3, 4)),
        (
            {"name": "clustered", "alpha": 2, "beta": 0.5, "num_clusters": 3},
            clustered_mask(20, 16, 2.0, 0.5, 3),
        ),
        (
            {"name": "explicit_clustered", "shared": 0.25, "num_clusters": 3},
            explicit_clustered_mask(20, 16, 0.25, 3),
        ),
    ],
)
def test_every_routing_configuration_builds_its_mask(values, expected):
    mask = Router(config(values), 20).mask(16, step=49)
    assert mask is expected if expected is None else torch.equal(mask, expected)


def test_a_schedule_over_training_goes_from_its_first_to_its_last_values():
    maker = router(OVER_TRAINING)
    for steps, alpha, beta in (
        (range(10), 1.0, 1.0),
        (range(10, 20), 8**0.4, 0.8),
        (range(20, 25), 8**0.8, 0.6),
        (range(25, 60), 8.0, 0.5),
    ):
        assert all(torch.equal(maker.mask(C, step), dtr_mask(T, C, alpha, beta)) for step in steps)


def test_a_schedule_over_blocks_goes_from_the_first_block_to_the_last():
    mask = router(OVER_BLOCKS).mask(C, 0, 4)
    expected = [dtr_mask(T, C, 8 ** (i / 3), 1 - i / 6) for i in range(4)]
    assert torch.equal(mask, torch.stack(expected))
    assert torch.equal(router(OVER_BLOCKS).mask(C, 0, 1)[0], dtr_mask(T, C, 1.0, 1.0))


@pytest.mark.parametrize("over", ["blocks", "training"])
@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 0.8), (0.3, 0.55), (7.7, 1 / 3)])
def test_a_schedule_between_equal_values_is_dtr(over, alpha, beta):
    values = {"alpha": alpha, "last_alpha": alpha, "beta": beta, "last_beta": beta, "last_step": 70}
    maker = router({"name": "scheduled", "over": over, "every_steps": 1, **values})
    expected = dtr_mask(T, C, alpha, beta)
    for step in range(0, 80, 7):
        assert (maker.mask(C, step, 5) == expected).all()


def test_a_schedule_over_blocks_is_refused_where_blocks_differ_in_width():
    with pytest.raises(ValueError, match="scheduled over blocks: it is for models whose blocks"):
        router(OVER_BLOCKS).mask(C)
    with pytest.raises(ValueError, match="blocks are of one width"):
        ChannelMask(router(OVER_BLOCKS), C)


def test_a_mask_for_each_block_routes_each_block_by_its_own():
    generator = torch.Generator().manual_seed(7)
    masks = torch.rand(BLOCKS, T, C, generator=generator) < 0.5
    whole = DiT(**SIZES, mask=masks)
    weights = fill_weights(whole.state_dict(), 5, 0.2)
    whole.load_state_dict(weights)
    assert whole.num_timesteps == T
    x, t, y = inputs()
    tokens = whole.x_embedder(x) + whole.pos_embed
    condition = whole.t_embedder(t) + whole.y_embedder(y)
    for block, mask in zip(whole.blocks, masks, strict=True):
        on = mask[t].unsqueeze(1).float()
        tokens = block(tokens * on, condition) + tokens * (1 - on)
    expected = whole._to_image(whole.final_layer(tokens, condition))
    torch.testing.assert_close(whole(x, t, y), expected, rtol=1e-5, atol=1e-5)
    same = DiT(**SIZES, mask=masks[:1].expand(BLOCKS, T, C).contiguous())
    one = DiT(**SIZES, mask=masks[0])
    for model in (same, one):
        model.load_state_dict(weights)
    assert torch.equal(same(x, t, y), one(x, t, y))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(T, C),
        torch.ones(T, C - 1, dtype=torch.bool),
        torch.ones(0, C, dtype=torch.bool),
        torch.ones(BLOCKS + 1, T, C, dtype=torch.bool),
        torch.ones(1, 1, T, C, dtype=torch.bool),
        torch.ones(C, dtype=torch.bool),
    ],
)
def test_a_mask_of_another_type_or_shape_is_refused(mask):
    with pytest.raises(ValueError, match=rf"of shape \(T, {C}\) or \({BLOCKS}, T, {C}\)"):
        DiT(**SIZES, mask=mask)
    with pytest.raises(ValueError, match=rf"of shape \(T, {C}\)$"):
        ChannelMask(mask, C)


@pytest.mark.parametrize("family", ["DiT", "Multi-DiT"])
@pytest.mark.parametrize("values", [ROAMING, OVER_TRAINING], ids=lambda values: values["name"])
def test_a_step_gives_all_parts_of_a_model_its_mask_in_place(family, values):
    model = model_of(values, family)
    parts = [part for part in model.modules() if isinstance(part, ChannelMask)]
    assert len(parts) == (len(model.experts) if isinstance(model, MultiDiT) else 1)
    buffers = [part.mask for part in parts]
    for step in (0, 9, 10, 33, 12):  # back as well: a checkpoint may be an older one
        set_step(model, step)
        for part, buffer in zip(parts, buffers, strict=True):
            assert part.mask is buffer
            assert torch.equal(part.mask, router(values).mask(C, step))


def test_a_copy_keeps_its_masks_and_changes_them_on_its_own():
    model = model_of(ROAMING)
    set_step(model, 20)
    twin = copy.deepcopy(model)
    set_step(model, 30)
    assert torch.equal(twin.mask, router(ROAMING).mask(C, 20))
    set_step(twin, 30)
    assert torch.equal(twin.mask, model.mask)
    assert torch.equal(twin(*inputs()), model(*inputs()))


def test_a_step_is_nothing_to_models_whose_masks_stay():
    for model in (model_of(None), model_of({"name": "dtr"}), torch.nn.Linear(2, 2)):
        before = getattr(model, "mask", None)
        kept = None if before is None else before.clone()
        set_step(model, 500)
        assert getattr(model, "mask", None) is before
        assert kept is None or torch.equal(before, kept)


def test_timesteps_out_of_range_are_refused():
    mask = ChannelMask(router({"name": "dtr"}), C)
    for t in (-1, T):
        with pytest.raises(IndexError):
            mask(torch.tensor([t]), torch.float32)
    assert mask(torch.tensor([3]), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("values", [ROAMING, OVER_TRAINING], ids=lambda values: values["name"])
def test_a_compiled_model_follows_its_masks_without_compiling_again(values):
    model = model_of(values).eval()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    outputs = []
    for step in (0, 10, 40):
        set_step(model, step)
        outputs.append(compiled(*inputs()))
        torch.testing.assert_close(outputs[-1], model(*inputs()), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[1])
