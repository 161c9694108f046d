"""Batches: what one training step sees, drawn from generators keyed by the step alone.

B batch of all workers, b one worker's share, C channels, T timesteps, K clusters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.data import ImageData
from dtr_ray.data.order import batch_indices
from dtr_ray.diffusion.intervals import Interval, stratified_timesteps
from dtr_ray.distributed import Group
from dtr_ray.models import drop_labels
from dtr_ray.randomness import keyed_generator

# Streams of random numbers, so that no two uses share a generator.
_TIMESTEPS, _NOISE, _LABELS, _FLIPS, _LATENTS = range(5)


@dataclass(frozen=True)
class Batch:
    """One worker's share of a training batch, on its device."""

    x: Tensor
    """float32 (b, C, H, W): pixels in [-1, 1], or scaled latents."""
    labels: Tensor
    """int64 (b,), dropped ones replaced by the null label."""
    t: Tensor
    """int64 (b,), in [0, T)."""
    noise: Tensor
    """Standard normal, as `x`."""
    cluster: Tensor | None
    """int64 (b,), in [0, K): the interval that each `t` was drawn from; None without a balancer."""
    counts: Tensor | None
    """int64 (K,): samples of each interval in the batch of all workers; None without a balancer."""


class Batches:
    """Draws the batch of any step: which images, labels, timesteps and noise.

    Every worker draws the random numbers of the whole batch and takes its own slice, so the batch does
    not depend on the number of workers.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: ImageData,
        group: Group,
        device: torch.device,
        *,
        null_label: int | None,
        intervals: list[Interval] | None,
    ) -> None:
        """Batches of `data` for a worker of `group`; `intervals` are a balancer's, None to draw t freely."""
        self._config = config
        self._data = data
        self._group = group
        self._device = device
        self._null_label = null_label
        self._intervals = intervals

    def at(self, step: int) -> Batch:
        """The batch of a 0-based step."""
        config, group = self._config, self._group
        size, seed = config.training.batch_size, config.training.seed
        indices = batch_indices(len(self._data), size, step, seed)
        labels = self._data.labels[indices]
        if self._null_label is not None:
            draws = torch.rand(size, generator=keyed_generator(seed, _LABELS, step))
            labels = drop_labels(labels, draws < config.model.class_dropout_prob, self._null_label)
        generator = keyed_generator(seed, _TIMESTEPS, step)
        cluster = counts = None
        if self._intervals is None:
            t = torch.randint(config.diffusion.num_timesteps, (size,), generator=generator)
        else:
            t, all_clusters = stratified_timesteps(self._intervals, size, generator)
            cluster = self._send(group.slice(all_clusters))
            counts = self._send(torch.bincount(all_clusters, minlength=len(self._intervals)))
        # Drawn where it is needed, so that a GPU run does not depend on the speed of its host.
        noise = torch.randn(
            size,
            *config.data.sample_shape,
            generator=keyed_generator(seed, _NOISE, step, device=self._device),
            device=self._device,
        )
        x = self._send(self._images(indices, step))
        t, labels = self._send(group.slice(t)), self._send(group.slice(labels))
        return Batch(x, labels, t, group.slice(noise), cluster, counts)

    def _images(self, indices: Tensor, step: int) -> Tensor:
        """This worker's share of the images (b, C, H, W), on the CPU."""
        config, group, seed = self._config, self._group, self._config.training.seed
        flip = None
        if config.data.horizontal_flip:
            draws = torch.rand(len(indices), generator=keyed_generator(seed, _FLIPS, step))
            flip = group.slice(draws) < 0.5
        generator = None
        if config.data.vae is not None:
            generator = keyed_generator(seed, _LATENTS, step)
            # The numbers of the workers before this one: then the share's are those of the whole batch.
            share = len(indices) // group.world_size
            torch.randn(group.rank * share, *config.data.sample_shape, generator=generator)
        return self._data.batch(group.slice(indices), flip, generator)

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device, without the host waiting for what still runs there: hence pinned memory."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
