"""Router: from a routing configuration to masks. T timesteps, C channels.

A new kind of mask needs three things: a class in `config/routing.py`, a function of plain numbers in
`routing.py` that makes the mask, and a line in `_RULES` here that joins them. The line also says how the mask
depends on the training step and whether it does on the block; `scheduled` is an example of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtr_ray.config import RoutingConfig
from dtr_ray.models.routing import (
    between,
    clustered_mask,
    dtr_mask,
    explicit_clustered_mask,
    max_roaming_mask,
    random_mask,
)


class _Spot(NamedTuple):
    """What a mask is made for."""

    num_timesteps: int
    num_channels: int
    step: int
    """The training step, as `_Rule.made_at` has it."""
    depth: float
    """Where the block stands: 0 is the first, 1 the last."""


class _Rule(NamedTuple):
    """How one kind of mask is made from its configuration."""

    make: Callable[[Any, _Spot], Tensor]
    """The mask (T, C)."""
    made_at: Callable[[Any, int], int] = lambda routing, step: 0
    """The step at which the mask in force at a training step was made; ever the same for one that stays."""
    by_block: Callable[[Any], bool] = lambda routing: False
    """Whether each block has its own."""


def _scheduled(routing: Any, spot: _Spot) -> Tensor:
    share = spot.depth if routing.over == "blocks" else min(spot.step / routing.last_step, 1.0)
    alpha = between(routing.alpha, routing.last_alpha, share, ratios=True)
    beta = between(routing.beta, routing.last_beta, share)
    return dtr_mask(spot.num_timesteps, spot.num_channels, alpha, beta)


def _schedule_step(routing: Any, step: int) -> int:
    if routing.over == "blocks":
        return 0
    return int(routing.last_step if step >= routing.last_step else step - step % routing.every_steps)


_RULES: dict[str, _Rule] = {
    "dtr": _Rule(lambda r, spot: dtr_mask(*spot[:2], r.alpha, r.beta, r.rule)),
    "random": _Rule(lambda r, spot: random_mask(*spot[:2], r.beta, r.seed)),
    "max_roaming": _Rule(
        lambda r, spot: max_roaming_mask(*spot[:2], r.beta, r.seed, spot.step // r.every_steps),
        made_at=lambda r, step: step - step % r.every_steps,
    ),
    "clustered": _Rule(lambda r, spot: clustered_mask(*spot[:2], r.alpha, r.beta, r.num_clusters)),
    "explicit_clustered": _Rule(lambda r, spot: explicit_clustered_mask(*spot[:2], r.shared, r.num_clusters)),
    "scheduled": _Rule(_scheduled, _schedule_step, by_block=lambda r: r.over == "blocks"),
}


@dataclass(frozen=True)
class Router:
    """The masks that a routing configuration asks for: a pure function of width, training step and block."""

    routing: RoutingConfig
    num_timesteps: int
    """T."""

    def mask(self, num_channels: int, step: int = 0, num_blocks: int | None = None) -> Tensor | None:
        """The mask after `step` training steps.

        Args:
            num_channels: C.
            step: 0 or above.
            num_blocks: of a model whose blocks all have C channels; None for other models.

        Returns:
            bool (T, C), or (num_blocks, T, C) where each block has its own; None without routing.

        Raises:
            ValueError: C is too small for the routing or T for its intervals, or the routing tells blocks
                apart and `num_blocks` is None.
        """
        if self.routing.name == "none":
            return None
        rule = _RULES[self.routing.name]
        made_at = rule.made_at(self.routing, step)
        if not rule.by_block(self.routing):
            return rule.make(self.routing, _Spot(self.num_timesteps, num_channels, made_at, depth=0.0))
        if num_blocks is None:
            raise ValueError(
                f"routing is {self.routing.name} over blocks: it is for models whose blocks are of one width"
            )
        depths = [block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        spots = [_Spot(self.num_timesteps, num_channels, made_at, depth) for depth in depths]
        return torch.stack([rule.make(self.routing, spot) for spot in spots])

    def made_at(self, step: int) -> int:
        """The step at which the mask in force after `step` training steps was made: it changes with it."""
        return 0 if self.routing.name == "none" else _RULES[self.routing.name].made_at(self.routing, step)

    @property
    def changes(self) -> bool:
        """Whether the masks change in training."""
        # A step that no training comes to: the last mask of all.
        return self.made_at(2**62) != 0
