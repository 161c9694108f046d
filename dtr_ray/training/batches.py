"""Batches: what one training step sees, drawn from generators keyed by the step alone.

B batch of all workers, b one worker's share, C channels, T timesteps, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.data import ImageData
from dtr_ray.data.order import batch_indices
from dtr_ray.diffusion.clustering import Interval
from dtr_ray.diffusion.intervals import stratified_timesteps
from dtr_ray.distributed import Group
from dtr_ray.models import drop_labels
from dtr_ray.randomness import keyed_generator

# Streams of random numbers, so that no two uses share a generator.
_TIMESTEPS, _NOISE, _LABELS, _FLIPS, _LATENTS, _CAPTIONS, DROPOUT = range(7)


@dataclass(frozen=True)
class Batch:
    """One worker's share of a training batch, on its device."""

    x: Tensor
    """float32 (b, C, H, W): pixels in [-1, 1], or scaled latents."""
    conditions: Tensor
    """Labels int64 (b,), or captions' tokens float32 (b, L, D); dropped ones replaced by those of none."""
    t: Tensor
    """int64 (b,), in [0, T)."""
    noise: Tensor
    """Standard normal, as `x`."""
    cluster: Tensor | None
    """int64 (b,), in [0, K): the interval that each `t` was drawn from; None without a balancer."""
    counts: Tensor | None
    """int64 (K,): samples of each interval in the batch of all workers; None without a balancer."""
    spans: tuple[tuple[int, int], ...] = ()
    """The rows [start, stop) of each interval in this share, known to the host; empty without a balancer."""

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, start: int, stop: int) -> "Batch":
        """The part of the share with these rows; its counts are still those of the batch of all workers."""
        tensors = {name: getattr(self, name)[start:stop] for name in ("x", "conditions", "t", "noise")}
        cluster = None if self.cluster is None else self.cluster[start:stop]
        return replace(self, **tensors, cluster=cluster, spans=())

    def parts(self, num_parts: int) -> Iterator["Batch"]:
        """The share in at most `num_parts` parts of about as many rows each, none of them empty."""
        count = min(num_parts, len(self))
        bounds = [len(self) * i // count for i in range(count + 1)]
        return (self.rows(start, stop) for start, stop in pairwise(bounds))

    def parts_by_interval(self, num_parts: int) -> Iterator[tuple[int, "Batch"]]:
        """Parts of one interval each, and which it is; none has more rows than the largest of `parts`."""
        largest = -(-len(self) // num_parts)
        for interval, (start, stop) in enumerate(self.spans):
            for first in range(start, stop, largest):
                yield interval, self.rows(first, min(first + largest, stop))


class Share(NamedTuple):
    """What the host makes of one worker's share of a batch: all but its noise, see `Batch`.

    In page-locked memory where it goes to a GPU, so that the host does not wait for what still runs there.
    """

    step: int
    x: Tensor
    conditions: Tensor
    """Tokens are float16 (b, L, D) here."""
    t: Tensor
    cluster: Tensor | None
    counts: Tensor | None
    spans: tuple[tuple[int, int], ...]


class Batches:
    """Draws the batch of any step: which images, labels or captions, timesteps and noise.

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
        self.device = device
        self._null_label = null_label
        self._intervals = intervals

    def at(self, step: int) -> Batch:
        """The batch of a 0-based step."""
        return self.sent(self.share(step))

    def share(self, step: int) -> Share:
        """What the host makes of the batch of a step; any thread may ask for it."""
        config, group = self._config, self._group
        size, seed = config.training.batch_size, config.training.seed
        indices = batch_indices(len(self._data), size, step, seed)
        generator = keyed_generator(seed, _TIMESTEPS, step)
        cluster = counts = None
        spans: tuple[tuple[int, int], ...] = ()
        if self._intervals is None:
            t = torch.randint(config.diffusion.num_timesteps, (size,), generator=generator)
        else:
            t, all_clusters = stratified_timesteps(self._intervals, size, generator)
            own = group.slice(all_clusters)
            cluster = self._locked(own)
            # Rows are ordered by their intervals.
            bounds = torch.searchsorted(own, torch.arange(len(self._intervals) + 1)).tolist()
            spans = tuple(pairwise(bounds))
            counts = self._locked(torch.bincount(all_clusters, minlength=len(self._intervals)))
        x, conditions = self._images(indices, step), self._conditions(indices, step)
        x, conditions, t = (self._locked(tensor) for tensor in (x, conditions, group.slice(t)))
        return Share(step, x, conditions, t, cluster, counts, spans)

    def sent(self, share: Share) -> Batch:
        """The batch on its device, with its noise."""
        # Drawn where it is needed, so that a GPU run does not depend on the speed of its host.
        training = self._config.training
        noise = torch.randn(
            training.batch_size,
            *self._config.data.sample_shape,
            generator=keyed_generator(training.seed, _NOISE, share.step, device=self.device),
            device=self.device,
        )
        x, conditions, t = (self._send(tensor) for tensor in (share.x, share.conditions, share.t))
        cluster, counts = (
            None if part is None else self._send(part) for part in (share.cluster, share.counts)
        )
        # Labels stay whole numbers.
        conditions = conditions.float() if conditions.is_floating_point() else conditions
        return Batch(x, conditions, t, self._group.slice(noise), cluster, counts, share.spans)

    def _conditions(self, indices: Tensor, step: int) -> Tensor:
        """This worker's share of the labels (b,), or of the captions' tokens (b, L, D), on the CPU."""
        captions, seed = self._data.captions, self._config.training.seed
        draws = torch.rand(len(indices), generator=keyed_generator(seed, _LABELS, step))
        dropped = draws < self._config.model.class_dropout_prob
        if captions is None:
            labels = self._data.labels[indices]
            if self._null_label is not None:
                labels = drop_labels(labels, dropped, self._null_label)
            return self._group.slice(labels)
        choices = torch.rand(len(indices), generator=keyed_generator(seed, _CAPTIONS, step))
        # Number 0 is the empty caption.
        numbers = captions.drawn(indices, choices).where(~dropped, 0)
        return captions.tokens(self._group.slice(numbers))

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

    def _locked(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
