"""The U-Net: against the authors' outputs and gradients, and what it keeps to."""

import copy
import hashlib
import pickle

import golden as golden_files
import pytest
import torch
from pydantic import ValidationError
from tiny_trials import METRIC, batches_of, digits, final_state, tiny_config
from torch import nn

from dtr_ray.config.routing import DTRRouting, MaxRoamingRouting
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.models import build_model, load_weights, set_step
from dtr_ray.models.adm import ADM
from dtr_ray.models.adm_layers import AttentionBlock, ResBlock
from dtr_ray.models.router import Router
from dtr_ray.models.routing import dtr_mask
from dtr_ray.training import train
from dtr_ray.training.state import TrainingState

SIZES = {
    "input_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_head_channels": 32,
    "num_classes": 5,
}
WIDTHS = [32, 64, 96, 128]
# Half of the channels on; at the last timestep those that are off at the first.
HALF = Router(DTRRouting(alpha=1.0, beta=0.5), 50)


def inputs(batch_size=3, num_classes=5, num_timesteps=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 3, 8, 8, generator=generator)
    t = torch.randint(num_timesteps, (batch_size,), generator=generator)
    return x, t, torch.randint(num_classes, (batch_size,), generator=generator)


def filled(**changes):
    """A small model whose weights, the zeros of its start included, are random."""
    model = ADM(**SIZES | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def blocks_of(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, ResBlock | AttentionBlock)}


@pytest.fixture(params=["cond", "uncond", "cond_dtr"])
def golden_case(request):
    """A case of OpenAI's guided-diffusion as (case, arrays, labels, model with its weights)."""
    arrays, meta = golden_files.load("adm_forward")
    case = next(case for case in meta["cases"] if case["name"] == request.param)
    routing = DTRRouting(alpha=meta["alpha"], beta=meta["beta"])
    model = ADM(
        **meta["sizes"],
        num_classes=case["num_classes"],
        class_dropout_prob=0.0,
        mask=Router(routing, meta["T"]) if case["routed"] else None,
    )
    weights = golden_files.fill_weights(model.state_dict(), meta["seed"], case["weight_scale"])
    model.load_state_dict(weights)
    labels = arrays["y"] if case["num_classes"] > 1 else torch.zeros_like(arrays["y"])
    return case, arrays, labels, model.eval()


def digest(model):
    lines = (f"{key} {list(value.shape)}" for key, value in sorted(model.state_dict().items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_outputs_are_the_authors(golden_case):
    case, arrays, labels, model = golden_case
    assert digest(model) == case["sha256_of_keys_and_shapes"]
    with torch.no_grad():
        out = model(arrays["x"], arrays["t"], labels)
    atol = 2e-5 * case["out_abs_max"]
    torch.testing.assert_close(out, arrays[f"{case['name']}_out"], rtol=0, atol=atol)


def test_gradients_are_the_authors(golden_case):
    case, arrays, labels, model = golden_case
    loss = model(arrays["x"], arrays["t"], labels).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_mean_out_sq"], rel=1e-5)
    norms = {name: parameter.grad.double().norm().item() for name, parameter in model.named_parameters()}
    # A bias before a norm of one channel a group has no gradient but rounding.
    assert norms == pytest.approx(case["grad_l2_norm"], rel=1e-4, abs=1e-5)


def test_the_64_px_model_is_the_released_one():
    _, meta = golden_files.load("adm_forward")
    released = meta["released_64px"]
    with torch.device("meta"):
        model = build_model({"name": "ADM-64", "class_dropout_prob": 0.0})
    assert sum(p.numel() for p in model.parameters()) == released["num_parameters"] == 295_904_454
    assert len(model.state_dict()) == released["num_keys"]
    assert digest(model) == released["sha256_of_keys_and_shapes"]
    assert (model.input_size, model.in_channels, model.out_channels, model.num_classes) == (64, 3, 6, 1000)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("time_embed.0.weight", (768, 192)),
        ("label_emb.weight", (1001, 768)),
        ("input_blocks.0.0.weight", (192, 3, 3, 3)),
        ("input_blocks.1.0.in_layers.2.weight", (192, 192, 3, 3)),
        ("input_blocks.4.0.out_layers.3.bias", (192,)),
        ("input_blocks.5.0.skip_connection.weight", (384, 192, 1, 1)),
        ("input_blocks.5.1.qkv.bias", (1152,)),
        ("middle_block.1.qkv.weight", (2304, 768, 1)),
        ("middle_block.2.emb_layers.1.weight", (1536, 768)),
        ("output_blocks.0.0.in_layers.0.weight", (1536,)),
        ("output_blocks.3.2.in_layers.2.weight", (768, 768, 3, 3)),
        ("output_blocks.15.0.in_layers.2.weight", (192, 384, 3, 3)),
        ("out.2.weight", (6, 192, 3, 3)),
    ],
)
def test_weights_have_the_official_names(key, shape):
    with torch.device("meta"):
        model = build_model({"name": "ADM-64"})
    assert model.state_dict()[key].shape == shape


def test_routing_adds_no_parameter_and_a_mask_for_each_width():
    with torch.device("meta"):
        plain, routed = build_model({"name": "ADM-64"}), build_model({"name": "ADM-64"}, {"name": "dtr"})
    assert digest(routed) == digest(plain)
    assert [name for name, _ in routed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    widths = [192, 384, 576, 768, 960, 1152, 1344, 1536]
    assert list(routed.masks) == [str(width) for width in widths]
    for width in widths:
        assert torch.equal(routed.masks[str(width)].mask, dtr_mask(1000, width, 4.0, 0.8))
    assert (routed.num_timesteps, plain.num_timesteps) == (1000, None)


def test_an_official_checkpoint_file_loads(tmp_path):
    weights = filled(class_dropout_prob=0.0).state_dict()
    extra = {"input_blocks.1.0.routing._unit_mapping": torch.ones(1000, 32)}
    torch.save(weights | extra, tmp_path / "8x8_diffusion.pt")
    config = {"name": "ADM"} | SIZES
    model = build_model(config | {"class_dropout_prob": 0.0}, {"name": "dtr"})
    load_weights(model, tmp_path / "8x8_diffusion.pt")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"label_emb.weight has shape \(5, 128\); the model needs \(6, 128\)"
    ):
        load_weights(build_model(config), tmp_path / "8x8_diffusion.pt")


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_new_model_predicts_zero_and_its_blocks_keep_what_they_get(learn_sigma):
    model = ADM(**SIZES, learn_sigma=learn_sigma)
    out = model(*inputs())
    assert out.shape == (3, 6 if learn_sigma else 3, 8, 8)
    assert not out.any()
    h, condition = torch.randn(3, 64, 4, 4), torch.randn(3, 128)
    for block in model.middle_block:
        assert torch.equal(block(h, condition, {}), h)


@pytest.mark.parametrize("multipliers", [(1,), (2, 1), (1, 2, 3)])
@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_other_depths_keep_the_input_shape(multipliers, num_res_blocks):
    sizes = {"channel_multipliers": multipliers, "num_res_blocks": num_res_blocks}
    model = filled(**sizes, attention_resolutions=(8, 2), mask=HALF)
    out = model(*inputs())
    assert out.shape == (3, 6, 8, 8)
    assert out.isfinite().all()


def test_attention_is_at_the_heights_asked_for_and_in_the_middle():
    def places(heights):
        blocks = blocks_of(filled(attention_resolutions=heights))
        return [name for name, part in blocks.items() if isinstance(part, AttentionBlock)]

    at_4 = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    assert places((4,)) == places((4, 16)) == at_4
    assert places(()) == ["middle_block.1"]
    assert places([8]) == ["input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"]


def test_channels_that_are_off_do_not_reach_a_blocks_convolution_or_attention():
    model = filled(mask=HALF)
    x, _, y = inputs()
    t = torch.full((3,), 10)
    norms, convolved = {}, {}
    for name, block in blocks_of(model).items():
        if isinstance(block, ResBlock):
            norm, _, conv = block.in_layers
            norm.register_forward_hook(lambda m, given, out, key=name: norms.update({key: out}))
            conv.register_forward_hook(lambda m, given, out, key=name: convolved.update({key: given[0]}))
    model(x, t, y).square().mean().backward()
    for name, block in blocks_of(model).items():
        on = dtr_mask(50, block.num_channels, 1.0, 0.5)[10]
        weight = block.qkv.weight if isinstance(block, AttentionBlock) else block.in_layers[2].weight
        # Only what is 0 in all samples and places leaves a weight without a gradient.
        assert not weight.grad[:, ~on].any()
        assert weight.grad[:, on].flatten(2).abs().sum(dim=(0, 2)).all()
        if isinstance(block, ResBlock):
            inside = convolved[name]
            assert not inside[:, ~on].any()
            if block.resample is None:
                assert torch.equal(inside[:, on], nn.functional.silu(norms[name][:, on]))
            assert block.out_layers[3].weight.grad.flatten(2).abs().sum(dim=(0, 2)).all()
            if not isinstance(block.skip_connection, nn.Identity):
                assert block.skip_connection.weight.grad.flatten(1).abs().sum(dim=0).all()


@pytest.mark.parametrize("number", [0, 1])
def test_channels_that_are_off_pass_a_block_by(number):
    """With one channel a group, so that a channel that is off has no part in the others' statistics."""
    model = filled(channel_multipliers=(1,), attention_resolutions=(8,), mask=HALF)
    block = model.middle_block[number]
    routes = model._routes(torch.tensor([0, 20, 49]), torch.float32)
    off = 1 - routes[32]
    generator = torch.Generator().manual_seed(2)
    h, change = torch.randn(2, 3, 32, 8, 8, generator=generator)
    condition = torch.randn(3, 128, generator=generator)
    moved = block(h + change * off, condition, routes) - block(h, condition, routes)
    torch.testing.assert_close(moved, change * off, rtol=0, atol=1e-5)


def test_each_sample_is_routed_by_its_own_timestep():
    model = filled(mask=HALF)
    x, t, y = inputs(batch_size=4)
    assert len(t.unique()) > 2
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    rows = model._routes(t, torch.float32)
    assert list(rows) == WIDTHS
    for width, on in rows.items():
        assert torch.equal(on[:, :, 0, 0].bool(), dtr_mask(50, width, 1.0, 0.5)[t])


def test_the_mask_of_each_width_takes_part():
    x, t, y = inputs()
    everything = {width: torch.ones(50, width, dtype=torch.bool) for width in WIDTHS}
    plain = filled()(x, t, y)
    for width in WIDTHS:
        model = filled(mask=everything | {width: dtr_mask(50, width, 1.0, 0.5)})
        assert model.num_timesteps == 50
        assert not torch.allclose(model(x, t, y), plain, rtol=0, atol=1e-4)


def test_masks_with_everything_on_equal_no_mask_bit_for_bit():
    x, t, y = inputs()
    with_mask, without = filled(mask=Router(DTRRouting(beta=1.0), 50)), filled()
    assert with_mask.num_timesteps == 50
    assert without.num_timesteps is None
    losses = [model(x, t, y).square().mean() for model in (with_mask, without)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(with_mask.parameters(), without.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_masks_that_roam_follow_the_training_step_in_every_width():
    model = filled(mask=Router(MaxRoamingRouting(beta=0.5, every_steps=10), 50))
    before = {width: mask.mask.clone() for width, mask in model.masks.items()}
    set_step(model, 1000)
    for width, mask in model.masks.items():
        assert not torch.equal(mask.mask, before[width])
        assert (mask.mask.sum(dim=1) == int(width) // 2).all()


@pytest.mark.parametrize("mask", [None, HALF])
def test_gradients_reach_every_parameter(mask):
    # Two channels a group at least: a norm of a single one undoes the bias before it.
    model = filled(hidden_size=64, num_head_channels=64, mask=mask)
    x, t, _ = inputs(batch_size=5)
    model(x, t, torch.arange(5)).square().mean().backward()
    assert all(parameter.grad.abs().max() > 1e-9 for parameter in model.parameters())


def test_the_null_label_exists_only_with_label_dropout():
    x, t, y = inputs()
    model, without = filled(), filled(class_dropout_prob=0.0)
    assert model.null_label == 5
    assert model.label_emb.weight.shape == (6, 128)
    assert without.null_label is None
    assert without.label_emb.weight.shape == (5, 128)
    null = torch.full_like(y, 5)
    assert not torch.equal(model(x, t, null), model(x, t, y))
    with pytest.raises(IndexError):
        without(x, t, null)


def test_without_classes_there_is_no_label_table():
    model = filled(num_classes=1)
    assert model.null_label is None
    assert model.label_emb is None
    assert "label_emb.weight" not in model.state_dict()
    x, t, y = inputs()
    assert torch.equal(model(x, t, y), model(x, t, torch.zeros_like(y)))


def test_the_forward_draws_nothing_at_random_but_dropout_in_training():
    x, t, y = inputs()
    models = filled().train(), filled(dropout=0.5).eval()
    state = torch.get_rng_state()
    for model in models:
        assert torch.equal(model(x, t, y), model(x, t, y))
    assert torch.equal(state, torch.get_rng_state())
    model = filled(dropout=0.5).train()
    assert not torch.equal(model(x, t, y), model(x, t, y))


def test_a_copy_and_a_pickle_keep_masks_and_outputs():
    model = filled(mask=HALF)
    arguments = inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*arguments), model(*arguments))
        twin.load_state_dict(model.state_dict())


def test_it_compiles_as_one_graph_with_the_same_gradients():
    model, twin = filled(mask=HALF), filled(mask=HALF)
    arguments = inputs()
    torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments).square().mean().backward()
    twin(*arguments).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", [None, HALF])
def test_under_bf16_autocast_norms_and_the_output_are_float32(mask, monkeypatch):
    model, arguments, seen = filled(mask=mask), inputs(), []
    exact, group_norm = model(*arguments), nn.functional.group_norm

    def spy(x, *others):
        seen.append(x.dtype)
        return group_norm(x, *others)

    monkeypatch.setattr(nn.functional, "group_norm", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*arguments)
    assert out.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert (out - exact).norm() < 0.03 * exact.norm()
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_runs_in_other_precisions(dtype):
    model = filled(mask=HALF)
    x, t, y = inputs()
    exact, out = model(x, t, y), model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert (out.float() - exact).norm() < (1e-5 if dtype == torch.float64 else 0.05) * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 16, 16)}, r"x has shape \(3, 3, 16, 16\): it must be \(B, 3, 8, 8\)"),
        ({"x": torch.zeros(3, 8, 8)}, "x has shape"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"t has shape \(2,\): it must be \(3,\)"),
        ({"t": torch.zeros(3)}, "t is of torch.float32: it must be int64"),
        ({"y": torch.zeros(3, 1, dtype=torch.int64)}, r"y has shape \(3, 1\)"),
        ({"y": torch.zeros(3)}, "y is of torch.float32"),
    ],
)
def test_wrong_inputs_are_named_with_the_rule(change, message):
    arguments = dict(zip("xty", inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ADM(**SIZES)(**arguments)


@pytest.mark.parametrize("t", [-1, 50])
def test_a_timestep_outside_the_masks_is_refused(t):
    x, _, y = inputs()
    with pytest.raises(IndexError):
        filled(mask=HALF)(x, torch.full((3,), t), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size is 9: 1 halvings need a multiple of 2"),
        ({"hidden_size": 48}, "hidden_size is 48: the group norms need a multiple of 32"),
        ({"num_head_channels": 48}, "num_head_channels is 48: it must divide the 64 channels"),
        ({"channel_multipliers": ()}, "channel_multipliers is empty"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob is 1.0: it must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout is -0.1: it must be in \[0, 1\)"),
        ({"mask": {32: torch.ones(50, 32).bool()}}, r"mask has the widths \[32\]: it must have the model's"),
        (
            {"mask": {w: torch.ones(50, w).bool() if w > 32 else torch.ones(9, w).bool() for w in WIDTHS}},
            "mask has 9 and 50 rows",
        ),
        ({"mask": {w: torch.ones(50, 31).bool() for w in WIDTHS}}, r"must be torch.bool of shape \(T, 32\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        ADM(**SIZES | change)


@pytest.mark.parametrize("resolution", [8, 12, 16])
@pytest.mark.parametrize("multipliers", [[1, 2], [1, 1, 3], [2, 1, 1, 1]])
@pytest.mark.parametrize("hidden", [32, 48, 64])
@pytest.mark.parametrize("heads", [32, 48, 64])
def test_a_trial_takes_the_sizes_that_the_model_takes(resolution, multipliers, hidden, heads):
    sizes = {
        "hidden_size": hidden,
        "channel_multipliers": multipliers,
        "num_res_blocks": 1,
        "attention_resolutions": [resolution],
        "num_head_channels": heads,
    }

    def fits(build):
        try:
            build()
        except (ValidationError, ValueError):
            return False
        return True

    with torch.device("meta"):
        expected = fits(lambda: ADM(resolution, 1, **sizes))
    model = {"name": "ADM"} | sizes
    trial = {f"model__{key}": value for key, value in model.items()}
    drop = {f"model__{key}": None for key in ("depth", "num_heads", "patch_size")}
    assert fits(lambda: tiny_config(**drop | trial, data__resolution=resolution)) == expected


def test_the_tiny_preset_learns_digits_and_samples(tmp_path):
    config = tiny_config(
        data__resolution=16,
        model={"name": "ADM-T"},
        routing={"name": "dtr"},
        training__num_steps=20,
        training__batch_size=12,
        training__ema_decay=0.9,
        training__gradient_clip=1.0,
        evaluation__every_steps=20,
    )
    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)
    fresh = TrainingState.build(config, torch.device("cpu"))
    assert isinstance(fresh.model, ADM)
    held_out = batches_of(config, fresh).at(100_000)

    def loss_on_one_batch(state):
        found = diffusion_losses(
            state.model.eval(), schedule, held_out.x, held_out.t, held_out.noise, {"y": held_out.conditions}
        )
        return float(found["mse"].mean().detach())

    (report,) = train(config, tmp_path, digits(config))
    trained = final_state(config, tmp_path)
    assert loss_on_one_batch(trained) < 0.5 * loss_on_one_batch(fresh)
    assert torch.tensor(report.metrics[METRIC]).isfinite()
    assert (tmp_path / report.grid).is_file()
