"""One training step: from a batch to gradients, the same for any number of workers, to new weights.

K clusters (intervals of timesteps), P parameters, B batch of all workers, b one worker's share.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._functorch.config as compiled_graphs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtr_ray.config import TrialConfig
from dtr_ray.diffusion.balancers import GradientBalancer, LossBalancer
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.diffusion.weightings import build_weights
from dtr_ray.distributed import Group
from dtr_ray.randomness import keyed_draws
from dtr_ray.training.batches import DROPOUT, Batch
from dtr_ray.training.interval_gradients import IntervalGradients
from dtr_ray.training.state import TrainingState

Losses = Callable[[Batch], tuple[Tensor, Tensor | None]]
"""Gives the losses (b,) of a part of a batch, and the model's extra loss on it, a scalar, if it has one."""
Gradients = Callable[[Batch], Tensor]
"""Puts a batch's gradient into `.grad` of all parameters, and gives the loss, to be averaged over workers."""


def build_step(config: TrialConfig, state: TrainingState, group: Group) -> Callable[[Batch], None]:
    """The function that makes one optimizer step from a batch.

    Nothing in it waits for the device, but for NashMTL's new weights. A share of a batch goes through
    the model in `training.accumulation_steps` parts. A model's forward may give a pair in training mode: its
    output, and an extra loss (scalar, a mean over its samples), which is added to the loss as it is.

    Raises:
        ValueError: the device has not the memory for the gradients of a balancer's intervals.
    """
    settings, device = config.training, state.device
    if isinstance(state.balancer, GradientBalancer):
        gradients: Gradients = _BalancedGradients(config, state, group, state.balancer)
    else:
        gradients = _loss_gradients(config, state, group, state.balancer)

    def draws() -> AbstractContextManager[None]:
        if not config.model.value("dropout"):
            return nullcontext()
        return keyed_draws(settings.seed, DROPOUT, state.step, group.rank, device=device)

    def step(batch: Batch) -> None:
        # One context for all parts: the weights are cast to bfloat16 once.
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"), draws():
            loss = gradients(batch)
        if settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), settings.gradient_clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        warm = (1 + state.step) / (10 + state.step) if settings.ema_warmup else 1.0
        state.update_ema(min(settings.ema_decay, warm))
        state.pending.append(loss)

    return step


def _loss_gradients(
    config: TrialConfig, state: TrainingState, group: Group, balancer: LossBalancer | None
) -> Gradients:
    """Gradients of one loss; workers average them while they are made (DistributedDataParallel)."""
    model, wrapped = state.model, None
    if group.world_size > 1:
        model = wrapped = DistributedDataParallel(state.model, broadcast_buffers=False)
    losses_of = _losses(config, torch.compile(model) if config.training.compile else model, state.device)

    def accumulate(part: Batch, share: float) -> Tensor:
        losses, extra = losses_of(part)
        if balancer is None:
            loss = share * losses.mean()
        else:
            assert part.cluster is not None
            assert part.counts is not None
            loss = balancer(losses, part.cluster, part.counts, world_size=group.world_size, share=share)
        if extra is not None:
            loss = loss + share * extra
        _backward(loss)
        return loss.detach()

    def gradients(batch: Batch) -> Tensor:
        *first, last = batch.parts(config.training.accumulation_steps)
        found = []
        with _silent(wrapped):
            found += [accumulate(part, len(part) / len(batch)) for part in first]
        found.append(accumulate(last, len(last) / len(batch)))
        for parameter in balancer.parameters() if balancer is not None else ():
            assert parameter.grad is not None
            group.mean_(parameter.grad)
        return torch.stack(found).sum()

    return gradients


class _BalancedGradients:
    """The weighted sum of the gradients of the intervals' mean losses, and the extra loss's gradient.

    The samples of each interval go through the model by themselves, in parts no larger than accumulation
    makes them, so that K gradients cost about one forward and backward in all. Workers add up the whole
    buffer of gradients once, at the end. At steps for which the balancer knows the weights already, the
    share goes through as without it, with weighted losses.

    The extra loss has a backward pass of its own, through what it depends on alone; through all of the
    model where that is compiled.
    """

    def __init__(
        self, config: TrialConfig, state: TrainingState, group: Group, balancer: GradientBalancer
    ) -> None:
        self._settings, self._state, self._group, self._balancer = config.training, state, group, balancer
        model: Callable[..., object] = state.model
        self._losses_of = _losses(
            config, torch.compile(model) if config.training.compile else model, state.device
        )
        self._buffer = IntervalGradients(list(state.model.parameters()), len(balancer.intervals))

    def __call__(self, batch: Batch) -> Tensor:
        counts = batch.counts
        assert counts is not None
        self._buffer.clear()
        weights = self._balancer.plain_weights(self._state.step, counts)
        if weights is None:
            found = self._by_interval(batch, counts)
        else:
            found = self._at_once(batch, weights / counts.clamp(min=1))
        return torch.stack(found).sum() / len(batch)

    def _by_interval(self, batch: Batch, counts: Tensor) -> list[Tensor]:
        parts = batch.parts_by_interval(self._settings.accumulation_steps)
        found = [self._accumulate(part, 1 / counts[interval], interval) for interval, part in parts]
        gram = self._buffer.sum_over(self._group)
        self._buffer.combine(self._balancer.weigh(gram, counts, self._settings.seed, self._state.step))
        return found

    def _at_once(self, batch: Batch, factors: Tensor) -> list[Tensor]:
        found = []
        for part in batch.parts(self._settings.accumulation_steps):
            assert part.cluster is not None
            found.append(self._accumulate(part, factors[part.cluster], None))
        self._buffer.sum_combined_over(self._group)
        return found

    def _accumulate(self, part: Batch, factors: Tensor, interval: int | None) -> Tensor:
        """Adds the gradient of sum(factors * losses); gives the sum of the plain losses."""
        with _to_go_back_twice() if self._settings.compile else nullcontext():
            losses, extra = self._losses_of(part)
            total = losses.detach().mean()
            if extra is not None:
                total = total + extra.detach()
                if extra.requires_grad:
                    self._buffer.collect(None)
                    _backward(len(part) / self._settings.batch_size * extra, retain_graph=True)
            self._buffer.collect(interval)
            _backward((factors * losses).sum())
        return len(part) * total


def _losses(config: TrialConfig, model: Callable[..., object], device: torch.device) -> Losses:
    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps).to(device)
    weights = build_weights(config.weighting, schedule)
    weights = None if weights is None else weights.to(device, torch.float32)

    def losses_of(part: Batch) -> tuple[Tensor, Tensor | None]:
        extras: list[Tensor] = []

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            found = model(x, t, y)
            if isinstance(found, tuple):
                found, extra = found
                extras.append(extra)
            assert isinstance(found, Tensor)
            return found

        conditions = {"y": part.conditions}
        losses = diffusion_losses(predict, schedule, part.x, part.t, part.noise, conditions, weights)["loss"]
        return losses, extras[0] if extras else None

    return losses_of


def _backward(loss: Tensor, retain_graph: bool = False) -> None:
    """Not under autocast, which is for forwards."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(retain_graph=retain_graph)


def _to_go_back_twice() -> AbstractContextManager[None]:
    """A model that is compiled in it, forward and backward, allows for `retain_graph`."""
    # By default a compiled backward pass overwrites what the forward has kept.
    context: AbstractContextManager[None] = compiled_graphs.patch(donated_buffer=False)
    return context


def _silent(wrapped: DistributedDataParallel | None) -> AbstractContextManager[None]:
    """In it gradients add up on each worker alone."""
    context: AbstractContextManager[None] = nullcontext() if wrapped is None else wrapped.no_sync()
    return context
