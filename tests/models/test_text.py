"""A DiT that captions' tokens condition: DTR, appendix C and figure 8."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtr_ray.models import build_model
from dtr_ray.models.dit import DiT
from dtr_ray.models.layers import DiTBlock, Route
from dtr_ray.models.routing import dtr_mask
from dtr_ray.models.text import CrossAttention

SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 1,
}
D = 12


def text_dit(**changes: object) -> DiT:
    """A model that is no longer at its start, where text has no effect yet."""
    torch.manual_seed(0)
    model = DiT(**{**SIZES, "text_channels": D, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(num_samples: int = 3, num_tokens: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 4, 8, 8, generator=generator)
    y = torch.randn(num_samples, num_tokens, D, generator=generator)
    return x, torch.arange(num_samples) * 300, y


def test_cross_attention_is_the_formula():
    torch.manual_seed(0)
    layer = CrossAttention(8, 2, 5).double()
    nn.init.normal_(layer.norm.weight)
    x, text = torch.randn(2, 3, 8).double(), torch.randn(2, 6, 5).double()
    normed = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed * layer.norm.weight + layer.norm.bias
    q = normed @ layer.q.weight.T + layer.q.bias
    k, v = (text @ layer.kv.weight.T + layer.kv.bias).split(8, dim=2)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].mT / 4**0.5).softmax(dim=2)
        heads.append(weights @ v[..., head])
    expected = torch.cat(heads, dim=2) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, text), expected)


def test_cross_attention_comes_between_self_attention_and_mlp_within_the_masked_copy():
    torch.manual_seed(0)
    block = DiTBlock(8, 2, 2.0, CrossAttention(8, 2, 5))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, condition, text = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 6, 5)
    on = (torch.arange(8) < 5).float().expand(2, 1, 8)
    assert block.cross_attn is not None
    plain = DiTBlock(8, 2, 2.0)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("cross_attn")})
    # The block without its MLP, the text's part on it, and the block without its self-attention.
    silent_mlp, silent_attention = DiTBlock(8, 2, 2.0), DiTBlock(8, 2, 2.0)
    for part, silent in ((silent_mlp, slice(40, 48)), (silent_attention, slice(16, 24))):
        part.load_state_dict(plain.state_dict())
        part.get_parameter("adaLN_modulation.1.weight").data[silent] = 0
        part.get_parameter("adaLN_modulation.1.bias").data[silent] = 0
    h = silent_mlp(x * on, condition)
    h = h + block.cross_attn(h, text)
    expected = silent_attention(h, condition) + x * (1 - on)
    torch.testing.assert_close(block(x, condition, Route(on, 1 - on), text), expected)


def test_new_blocks_are_the_identity_and_new_models_predict_zero():
    torch.manual_seed(0)
    model = DiT(**SIZES, text_channels=D)
    x, t, y = inputs()
    tokens = torch.randn(3, 16, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, torch.randn(3, 32), None, y), tokens)
    assert torch.equal(model(x, t, y), torch.zeros(3, 8, 8, 8))


def test_gradients_reach_the_text_after_one_step():
    torch.manual_seed(0)
    model = DiT(**SIZES, text_channels=D, class_dropout_prob=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t, y = inputs()
    for _ in range(4):  # the output layer first, then the gates, the projection, and what is before it
        optimizer.zero_grad()
        (model(x, t, y) - torch.cat([x, x], dim=1)).square().mean().backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's shift moves all scores of a query alike: its gradient is rounding, or nothing.
    assert [name for name in without if not name.endswith("kv.bias")] == []


def test_the_text_decides_and_its_order_too():
    model, (x, t, y) = text_dit(), inputs()
    out = model(x, t, y)
    assert out.shape == (3, 8, 8, 8)
    assert not torch.allclose(model(x, t, y.roll(1, dims=0)), out, atol=1e-4)
    # Attention is over a set: CLIP's tokens know their places themselves.
    torch.testing.assert_close(model(x, t, y.flip(1)), out, atol=1e-5, rtol=1e-4)


def test_samples_of_a_batch_do_not_see_each_other():
    model, (x, t, y) = text_dit(), inputs()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t, y), alone, atol=1e-5, rtol=1e-5)


def test_there_is_no_label_table_and_adaln_sees_the_timestep_alone():
    model = text_dit()
    assert not [name for name, _ in model.named_parameters() if name.startswith("y_embedder")]
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    x, t, y = inputs()
    model(x, t, y)
    model(x, t, -y)
    for condition in seen:
        assert torch.equal(condition, model.t_embedder(t))


def test_the_mask_routes_the_text_too():
    masked = text_dit(mask=dtr_mask(1000, 32, 4.0, 0.5))
    full = text_dit(mask=torch.ones(1000, 32, dtype=torch.bool))
    plain = text_dit()
    x, t, y = inputs()
    assert torch.equal(full(x, t, y), plain(x, t, y))
    assert not torch.allclose(masked(x, t, y), plain(x, t, y), atol=1e-3)
    count = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in masked.parameters()) == count


def test_null_tokens_are_kept_only_with_dropout_and_survive_saving(tmp_path: Path):
    model, other = text_dit(), text_dit()
    assert model.null_label is None
    assert model.null_tokens is not None
    assert model.null_tokens.shape == (77, D)
    model.null_tokens.copy_(torch.randn(77, D))
    other.load_state_dict(model.state_dict())
    assert other.null_tokens is not None
    assert torch.equal(other.null_tokens, model.null_tokens)
    without = text_dit(class_dropout_prob=0.0)
    assert without.null_tokens is None
    assert "null_tokens" not in without.state_dict()
    labelled = DiT(**SIZES)
    assert (labelled.null_label, labelled.null_tokens) == (1, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_draw_nearly_the_same(dtype: torch.dtype):
    model, (x, t, y) = text_dit(), inputs()
    expected = model(x, t, y)
    found = model.to(dtype)(x.to(dtype), t, y.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_the_configuration_builds_it():
    model = build_model({"name": "DiT-T/4", "input_size": 16, "in_channels": 1, "text_channels": D})
    assert isinstance(model, DiT)
    assert model.text_channels == D
    assert len(model.blocks) == 4


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"y has shape \(3,\): it must be \(3, L, 12\)"),
        (torch.zeros(3, 77, D + 1), r"y has shape \(3, 77, 13\)"),
        (torch.zeros(2, 77, D), r"y has shape \(2, 77, 12\)"),
        (torch.zeros(3, 0, D), r"y has shape \(3, 0, 12\)"),
        (torch.zeros(3, 77, D, dtype=torch.int64), "y is of torch.int64: text tokens are float"),
    ],
)
def test_what_is_no_text_is_refused(y: Tensor, message: str):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        text_dit()(x, t, y)
