"""Switch-DiT: a DiT with sparse experts at each block. B batch, N tokens, C channels, E experts, T timesteps.

Park et al., "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts".
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_ray.models.layers import Route
from dtr_ray.models.prior import Matching, diffusion_prior_loss, matching_costs, prior_mask
from dtr_ray.models.trunk import Trunk

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _uncompiled(function: _Function) -> _Function:
    """Keeps a function out of compiled graphs."""
    same: _Function = torch.compiler.disable(function)
    return same


class Experts(nn.Module):
    """E linear layers of C to C channels: x @ w[e] + b[e]."""

    def __init__(self, num_experts: int, num_channels: int) -> None:
        super().__init__()
        # Zeros, as the authors have them: a new block's soft mask is 1, so that it routes nothing yet.
        self.w = nn.Parameter(torch.zeros(num_experts, num_channels, num_channels))
        self.b = nn.Parameter(torch.zeros(num_experts, num_channels))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """The sum of the experts' outputs, each times its share.

        Linear layers summed with the shares of a sample are one linear layer: its weight is put together
        first, for each sample, and the tokens pass through it alone. So the experts left out cost nothing
        a token, no sample is moved to its expert, no size depends on the shares (no device waits for the
        host, and the graph is fixed), and every expert has a gradient, if of zeros, in every batch. On a CPU
        it takes half the time of moving samples to experts at 64 tokens and above, and as much at 16; in
        training each block keeps C x C weights a sample.

        Args:
            x: tokens (B, N, C).
            shares: (B, E), or (1, E) for all samples; 0 for an expert that is not chosen.

        Returns:
            (B, N, C).
        """
        weight, bias = (shares @ self.w.flatten(1)).unflatten(1, self.w.shape[1:]), shares @ self.b
        if len(shares) == 1:
            return torch.matmul(x, weight[0]) + bias[0]
        return torch.baddbmm(bias.unsqueeze(1), x, weight)


class SparseExperts(nn.Module):
    """A block's gate and experts; they make its soft mask."""

    def __init__(self, num_channels: int, num_experts: int) -> None:
        super().__init__()
        gate = nn.Linear(num_channels, num_experts)
        nn.init.xavier_uniform_(gate.weight)
        nn.init.zeros_(gate.bias)
        self.f_gate = nn.Sequential(nn.SiLU(), gate)
        self.experts = Experts(num_experts, num_channels)

    def forward(self, x: Tensor, shares: Tensor) -> Route:
        """The soft mask m = 1 + the chosen experts' outputs times their shares.

        Args:
            x: the block's input (B, N, C).
            shares: as for `Experts`: the probabilities of the chosen, not made to sum to 1 again.

        Returns:
            (B, N, C): m, which x is multiplied with on its way into the block; 1 - m, for what passes it by.
        """
        change = self.experts(x, shares).to(x.dtype)
        return Route(on=1 + change, off=-change)


class SwitchDiT(Trunk):
    """A DiT whose blocks' inputs pass through the experts that the timestep chooses.

    In training mode the forward gives a second value, the weighted diffusion prior loss, which
    is to be added to the loss; in evaluation mode it gives the output alone.

    The gates see nothing but the timestep. A forward computes those of its batch, of all blocks in one
    go and in float32 even under autocast; the prior's matching needs the choices at all T timesteps, so they
    are computed in training, without gradients, and never in evaluation (the authors' code does in
    every forward). Choices and matching follow from the weights alone: data-parallel workers agree on them
    without a word.

    Attributes:
        null_label: the label that stands for no class, `num_classes`; None without label dropout.
        num_timesteps: T.
        out_channels: `in_channels`, or twice as many with `learn_sigma` (noise first, then variance).
    """

    prior: Tensor
    timesteps: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        num_experts: int = 3,
        top_k: int = 2,
        prior_weight: float = 1.0,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_timesteps: int = 1000,
    ) -> None:
        """Builds the model with the authors' initial weights: those of `DiT`, and experts of zeros.

        Args:
            input_size: height and width of the input, a multiple of `patch_size`.
            patch_size: height and width of a token's patch.
            in_channels: channels of the input.
            hidden_size: C, a multiple of 4 and of `num_heads`.
            depth: number of blocks.
            num_heads: attention heads.
            num_classes: classes; 1 is unconditional.
            learn_sigma: predict the variance too.
            num_experts: E, experts of each block.
            top_k: experts that each timestep uses in a block, in [1, E].
            prior_weight: factor of the diffusion prior loss, the paper's w_JSD; 0 saves its work.
            mlp_ratio: width of the MLPs over C.
            class_dropout_prob: above 0 the label table has a row for the null label.
            num_timesteps: T, at least 2.

        Raises:
            ValueError: where sizes do not fit each other, or are out of range.
        """
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            num_classes,
            learn_sigma,
            mlp_ratio,
            class_dropout_prob,
        )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must be from 1 to num_experts {num_experts}")
        if prior_weight < 0:
            raise ValueError(f"prior_weight is {prior_weight}: it must be 0 or above")
        self.num_experts = num_experts
        self.top_k = top_k
        self.prior_weight = prior_weight
        self.num_timesteps = num_timesteps
        self.routers = nn.ModuleList(SparseExperts(hidden_size, num_experts) for _ in range(depth))
        prior = prior_mask(num_timesteps, depth, num_experts, top_k)
        self.register_buffer("prior", prior, persistent=False)
        self.register_buffer("timesteps", torch.arange(num_timesteps), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The predicted noise, followed by the variance's interpolation with `learn_sigma`; see the class.

        Args:
            x: float (B, in_channels, input_size, input_size).
            t: int64 (B,), training timesteps in [0, T). Where it is one value expanded (of stride 0), as when
                sampling, the experts' weights are put together once for the whole batch.
            y: int64 (B,), labels in [0, num_classes), or `null_label`. Dropping labels in training is the
                caller's: see `layers.drop_labels`.

        Returns:
            (B, out_channels, input_size, input_size), of x's dtype. In training mode a pair: this,
            and `prior_weight` times `prior_loss(t)`, a float32 scalar.

        Raises:
            ValueError: on other shapes, or timesteps and labels that are not integers.
        """
        self.check_inputs(x, t, y)
        has_prior = self.training and self.prior_weight > 0
        matching = self._match() if has_prior else None
        time = self._embed_times(t[:1] if t.stride(0) == 0 else t)
        probabilities = self._probabilities(time)
        shares = probabilities * self._chosen(probabilities)
        assert self.y_embedder is not None
        condition = time + self.y_embedder(y)
        tokens: Tensor = self.x_embedder(x) + self.pos_embed
        for i, (block, router) in enumerate(zip(self.blocks, self.routers, strict=True)):
            tokens = block(tokens, condition, router(tokens, shares[:, i]))
        image = self._to_image(self.final_layer(tokens, condition)).to(x.dtype)
        if matching is not None:
            return image, self.prior_weight * self._divergence(t, probabilities, matching)
        return (image, image.new_zeros((), dtype=torch.float32)) if self.training else image

    def gates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' probabilities in each block at the given timesteps, and which of them are chosen.

        Args:
            t: int64 (B,), in [0, T).

        Returns:
            Both (B, depth, E): probabilities, which sum to 1 over the last; 1.0 for the `top_k`, else 0.0.
        """
        probabilities = self._probabilities(self._embed_times(t))
        return probabilities, self._chosen(probabilities)

    def prior_loss(self, t: Tensor) -> Tensor:
        """The diffusion prior loss at the given timesteps, unweighted.

        The choices at all T timesteps are matched to the prior, one column for each expert of each block,
        such that they differ at the fewest timesteps; then the gates' probabilities are compared with the
        matched rows. The matching is exact and deterministic, with no gradient; the authors' code permutes
        the columns at random first, which matters only where several matchings cost the same.

        Args:
            t: int64 (B,), in [0, T).

        Returns:
            Scalar, float32: the mean Jensen-Shannon divergence over the batch, nats.
        """
        return self._divergence(t, self.gates(t)[0], self._match())

    def _embed_times(self, t: Tensor) -> Tensor:
        """(B, C); not in bfloat16 under autocast, so that a timestep makes the same choices everywhere."""
        with torch.autocast(t.device.type, enabled=False):
            embedding: Tensor = self.t_embedder(t)
        return embedding

    def _probabilities(self, time: Tensor) -> Tensor:
        """Of the experts in each block, (B, depth, E), from timestep embeddings (B, C)."""
        weights = torch.stack([router.get_parameter("f_gate.1.weight") for router in self.routers])
        biases = torch.stack([router.get_parameter("f_gate.1.bias") for router in self.routers])
        with torch.autocast(time.device.type, enabled=False):
            logits = F.linear(F.silu(time), weights.flatten(0, 1), biases.flatten())
        return torch.softmax(logits.unflatten(1, biases.shape), 2)

    def _chosen(self, probabilities: Tensor) -> Tensor:
        """1.0 for the most probable `top_k` experts of each block, else 0.0."""
        best = probabilities.topk(self.top_k, dim=2).indices
        return torch.zeros_like(probabilities).scatter_(2, best, 1.0)

    @_uncompiled
    @torch.no_grad()
    def _match(self) -> Matching:
        _, chosen = self.gates(self.timesteps)
        with torch.autocast(chosen.device.type, enabled=False):
            return Matching(matching_costs(chosen.flatten(1).float(), self.prior))

    @_uncompiled
    def _divergence(self, t: Tensor, probabilities: Tensor, matching: Matching) -> Tensor:
        rows = self.prior.index_select(0, t[:1] if t.stride(0) == 0 else t)
        return diffusion_prior_loss(probabilities, rows[:, matching.columns()])
