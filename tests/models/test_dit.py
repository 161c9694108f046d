"""The model: against the authors' outputs and gradients, and what it keeps to."""

import copy
import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch

from dtr_ray.models import build_model, drop_labels
from dtr_ray.models.dit import DiT
from dtr_ray.models.layers import Route
from dtr_ray.models.routing import dtr_mask

CASES = ["cond_s002", "cond_s02", "uncond_s02", "cond_nosigma_s02"]
SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
FILES = ["dit_forward", "dtr_forward"]


@pytest.fixture(params=list(itertools.product(FILES, CASES)), ids="-".join)
def golden_case(request, golden, golden_weights):
    """A golden case as (file, case, arrays, model with its weights)."""
    stem, name = request.param
    meta, arrays = golden(stem)
    case = next(case for case in meta["cases"] if case["name"] == name)
    mask = dtr_mask(meta["T"], meta["hidden"], meta["alpha"], meta["beta"]) if stem == "dtr_forward" else None
    model = DiT(
        8, 2, 4, meta["hidden"], meta["depth"], meta["heads"], case["num_classes"], case["learn_sigma"], mask,
        class_dropout_prob=0.0 if case["num_classes"] == 1 else 0.1,
    )  # fmt: skip
    model.load_state_dict(golden_weights(case, meta["seed"]))
    return stem, case, {key: torch.from_numpy(value) for key, value in arrays.items()}, model.eval()


def close(actual, expected, case):
    """Within the golden file's tolerance, relative to the largest output."""
    relative = 5e-6 if case["weight_scale"] == 0.02 else 5e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * case["out_abs_max"])


def guided(model, x, t, y, num_guided, scale=1.5):
    """Classifier-free guidance of the first channels, as the authors batch it."""
    half = x[: len(x) // 2]
    out = model(torch.cat([half, half]), t, y)
    with_label, without = out[:, :num_guided].chunk(2)
    noise = without + scale * (with_label - without)
    return torch.cat([torch.cat([noise, noise]), out[:, num_guided:]], dim=1)


def test_outputs_are_the_authors(golden_case):
    _, case, arrays, model = golden_case
    with torch.no_grad():
        out = model(arrays["x"], arrays["t"], torch.tensor(case["y_used"]))
    close(out, arrays[f"{case['name']}_out"], case)


@pytest.mark.parametrize(
    "golden_case", list(itertools.product(FILES, CASES[:2])), ids="-".join, indirect=True
)
def test_guided_outputs_are_the_authors(golden_case):
    stem, case, arrays, model = golden_case
    key, num_guided = ("cfg3ch_out", 3) if stem == "dit_forward" else ("cfg_out", 4)
    name = case["name"]
    with torch.no_grad():
        out = guided(model, arrays["x"], arrays[f"{name}_cfg_t"], arrays[f"{name}_cfg_y"], num_guided)
    close(out, arrays[f"{name}_{key}"], case)


def test_gradients_are_the_authors(golden_case):
    _, case, arrays, model = golden_case
    loss = model(arrays["x"], arrays["t"], torch.tensor(case["y_used"])).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_mean_out_sq"], rel=1e-5)
    relative = 1e-4 if case["weight_scale"] == 0.02 else 1e-3
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(case["grad_l2_norm"], rel=relative)
    for name, gradient in gradients.items():
        expected = arrays.get(f"{case['name']}_grad::{name}")
        if expected is not None:
            atol = relative * expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)


def test_positions_are_the_authors(golden):
    _, arrays = golden("dtr_forward")
    model = DiT(8, 2, 4, 64, 1, 4, 5)
    torch.testing.assert_close(model.pos_embed, torch.from_numpy(arrays["pos_embed"]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)]
)
def test_parameter_counts_are_the_papers(name, millions):
    with torch.device("meta"):
        model = build_model({"name": name})
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def inputs(batch_size=3, num_classes=5, num_timesteps=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 4, 8, 8, generator=generator)
    t = torch.randint(num_timesteps, (batch_size,), generator=generator)
    return x, t, torch.randint(num_classes, (batch_size,), generator=generator)


def filled(**changes):
    """A small model whose weights, the zeros of its start included, are random."""
    model = DiT(**SIZES | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def test_a_mask_with_everything_on_equals_no_mask_bit_for_bit():
    x, t, y = inputs()
    with_mask, without = filled(mask=dtr_mask(50, 32, 4.0, 1.0)), filled()
    assert with_mask.num_timesteps == 50
    assert without.num_timesteps is None
    losses = [model(x, t, y).square().mean() for model in (with_mask, without)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(with_mask.parameters(), without.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_each_sample_is_routed_by_its_own_timestep():
    model = filled(mask=dtr_mask(50, 32, 1.0, 0.5))
    x, t, y = inputs(batch_size=4)
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_channels_that_are_off_reach_the_blocks_output_and_nothing_else():
    model = filled(mask=dtr_mask(50, 32, 1.0, 0.5))
    on = model.mask[torch.tensor([0, 20, 49])].unsqueeze(1).float()
    route = Route(on=on, off=1 - on)
    generator = torch.Generator().manual_seed(2)
    tokens, change = torch.randn(2, 3, 16, 32, generator=generator)
    condition = torch.randn(3, 32, generator=generator)
    block = model.blocks[0]
    moved = block(tokens + change * route.off, condition, route) - block(tokens, condition, route)
    torch.testing.assert_close(moved, change * route.off, rtol=0, atol=1e-5)


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = DiT(**SIZES)
    x, t, y = inputs()
    assert not model(x, t, y).any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(model.blocks[0](tokens, torch.randn(3, 32)), tokens)


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = DiT(8, 2, 4, 128, 1, 4, 1000)
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (128 + 16))
    patches = model.x_embedder.proj.weight
    assert bound * 0.95 < patches.abs().max().item() <= bound
    qkv = model.blocks[0].attn.qkv.weight
    assert math.sqrt(6 / 512) * 0.95 < qkv.abs().max().item() <= math.sqrt(6 / 512)


def test_the_mask_and_checkpoints_routing_buffers_are_no_weights():
    routed, plain = filled(mask=dtr_mask(50, 32, 4.0, 0.8)), filled()
    assert routed.state_dict().keys() == plain.state_dict().keys()
    weights = routed.state_dict()
    del weights["pos_embed"]
    weights["blocks.0.routing._unit_mapping"] = torch.ones(1000, 32)
    plain.load_state_dict(weights)
    assert "blocks.0.routing._unit_mapping" in weights
    wrapped = torch.nn.ModuleDict({"model": plain})
    wrapped.load_state_dict({f"model.{key}": value for key, value in weights.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), "Missing key.*blocks.1.attn.qkv.bias"),
        (lambda w: w.update({"blocks.0.extra": torch.ones(1)}), "Unexpected key.*blocks.0.extra"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 4, 32)}), "size mismatch for pos_embed"),
    ],
)
def test_loading_is_strict_about_everything_else(change, message):
    weights = filled().state_dict()
    change(weights)
    with pytest.raises(RuntimeError, match=message):
        filled().load_state_dict(weights)


def test_a_copy_and_a_pickle_keep_mask_and_outputs():
    model = filled(mask=dtr_mask(50, 32, 4.0, 0.8))
    x, t, y = inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.mask, model.mask)
        assert torch.equal(twin(x, t, y), model(x, t, y))
        twin.load_state_dict(model.state_dict())


def test_the_null_label_exists_only_with_label_dropout():
    x, t, y = inputs()
    model, without = filled(), filled(class_dropout_prob=0.0)
    assert model.null_label == 5
    assert model.y_embedder.embedding_table.weight.shape == (6, 32)
    assert without.null_label is None
    assert without.y_embedder.embedding_table.weight.shape == (5, 32)
    null = torch.full_like(y, 5)
    assert not torch.equal(model(x, t, null), model(x, t, y))
    with pytest.raises(IndexError):
        without(x, t, null)


def test_dropped_labels_become_the_null_label():
    y, drop = torch.tensor([0, 1, 2]), torch.tensor([False, True, False])
    assert drop_labels(y, drop, 5).tolist() == [0, 5, 2]
    assert drop_labels(y, drop, 5).dtype == torch.int64
    with pytest.raises(ValueError, match="no null label"):
        drop_labels(y, drop, None)


@pytest.mark.parametrize("mode", [True, False])
def test_the_forward_draws_nothing_at_random(mode):
    model = filled().train(mode)
    x, t, y = inputs()
    state = torch.get_rng_state()
    assert torch.equal(model(x, t, y), model(x, t, y))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("beta", [None, 0.8])
def test_it_compiles_as_one_graph_with_the_same_gradients(beta):
    mask = None if beta is None else dtr_mask(50, 32, 4.0, beta)
    model, twin = filled(mask=mask), filled(mask=mask)
    x, t, y = inputs()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y).square().mean().backward()
    twin(x, t, y).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("beta", [None, 0.8])
def test_under_bf16_autocast_tokens_and_outputs_stay_float32(beta):
    model = filled(mask=None if beta is None else dtr_mask(50, 32, 4.0, beta))
    x, t, y = inputs()
    exact = model(x, t, y)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t, y)
    assert out.dtype == torch.float32
    assert seen == [torch.float32] * 2
    assert (out - exact).norm() < 0.02 * exact.norm()
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_runs_in_other_precisions(dtype):
    model = filled(mask=dtr_mask(50, 32, 4.0, 0.8))
    x, t, y = inputs()
    exact, out = model(x, t, y), model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert (out.float() - exact).norm() < (1e-5 if dtype == torch.float64 else 0.05) * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 16, 16)}, r"x has shape \(3, 4, 16, 16\): it must be \(B, 4, 8, 8\)"),
        ({"x": torch.zeros(4, 8, 8)}, "x has shape"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"t has shape \(2,\): it must be \(3,\)"),
        ({"t": torch.zeros(3)}, "t is of torch.float32: it must be int64"),
        ({"y": torch.zeros(3, 1, dtype=torch.int64)}, r"y has shape \(3, 1\)"),
        ({"y": torch.zeros(3)}, "y is of torch.float32"),
    ],
)
def test_wrong_inputs_are_named_with_the_rule(change, message):
    arguments = dict(zip("xty", inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        DiT(**SIZES)(**arguments)


@pytest.mark.parametrize("t", [-1, 50])
def test_a_timestep_outside_the_mask_is_refused(t):
    x, _, y = inputs()
    with pytest.raises(IndexError):
        filled(mask=dtr_mask(50, 32, 4.0, 0.8))(x, torch.full((3,), t), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "input_size is 8: it must be a multiple of patch_size 3"),
        ({"num_heads": 5}, "hidden_size is 32: it must be a multiple of num_heads 5"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size is 30: .* multiple of 4"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob is 1.0: it must be in \[0, 1\)"),
        ({"mask": torch.ones(50, 31).bool()}, r"shape \(50, 31\): it must be torch.bool of shape \(T, 32\)"),
        ({"mask": torch.ones(50, 32)}, "mask is torch.float32"),
        ({"mask": torch.ones(32, dtype=torch.bool)}, "mask is torch.bool of shape"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**SIZES | change)


def test_models_import_without_ray_and_mlflow():
    code = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; import dtr_ray.models"
    subprocess.run([sys.executable, "-c", code], check=True)
