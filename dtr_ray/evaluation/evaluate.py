"""Evaluator: draws the same samples from any model, once, and measures on them all that was asked for.

Noise and label (or caption) of sample i depend on (evaluation.seed, i) alone: not on the trial, the batch
size or the number of workers, so that differences between trials are not luck.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dtr_ray.config import TrialConfig
from dtr_ray.data import ImageData
from dtr_ray.data.cache import cache_dir
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.evaluation.extras import MEASURES, needs_features
from dtr_ray.evaluation.features import Extractor, build_extractor
from dtr_ray.evaluation.metrics import statistics
from dtr_ray.evaluation.references import reference_features, reference_statistics


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    metrics: dict[str, float]
    """The distance and the extra metrics, each under its own name and NaN where a sample is not finite,
    and `eval_seconds`."""
    grid: Tensor
    """The first samples, uint8 (n, C, H, W)."""
    columns: int

    def save_grid(self, path: Path) -> None:
        """Writes the samples as one PNG, row by row."""
        save_grid(self.grid, path, self.columns)


@lru_cache(maxsize=2)
def shared_extractor(name: str, weights: str | None, device: str) -> Extractor:
    """An extractor that trials which follow one another in a process share: loading takes a second."""
    return build_extractor(name, weights, device)


def sample_labels(indices: Tensor, num_classes: int) -> Tensor:
    """Labels of the samples of the given numbers, int64 (B,): the classes in turn."""
    return indices % num_classes


class Evaluator:
    """Evaluates models of one trial; the data's statistics are computed once per data set and cached."""

    def __init__(self, config: TrialConfig, data: ImageData, group: Group, device: torch.device) -> None:
        self.group = group
        self._config = config
        self._data = data
        self._device = device
        settings = config.evaluation
        self._extractor = shared_extractor(settings.features, settings.feature_weights, str(device))
        # Before the statistics, which need no second look at the images then.
        wanted = needs_features(settings.extra_metrics, len(data))
        self._features = reference_features(data, self._extractor, cache_dir()) if wanted else None
        self._reference = reference_statistics(data, self._extractor, cache_dir(), features=self._features)
        self._schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)

    def evaluate(
        self,
        model: nn.Module,
        on_batch: Callable[[], None] = lambda: None,
        on_images: Callable[[Tensor], None] = lambda images: None,
    ) -> Evaluation:
        """Draws `evaluation.num_samples` samples; all workers take part and get the same answer.

        Args:
            model: in evaluation mode, on this worker's device.
            on_batch: called after each of this worker's batches.
            on_images: called with the images of each of them before, uint8 (B, C, H, W), in order.
        """
        started = time.perf_counter()
        settings, group = self._config.evaluation, self.group
        mine = torch.arange(group.rank, settings.num_samples, group.world_size)
        shown = min(settings.grid_images, settings.num_samples)
        features, pictures, finite = [], [], []
        for indices in mine.split(settings.batch_size):
            x = self.draw(model, indices)
            finite.append(x.isfinite().all())
            images = self._data.to_pixels(x)
            features.append(self._extractor(images))
            pictures.append(images[indices < shown])
            on_images(images)
            on_batch()
        diverged = group.any(not torch.stack(finite).all(), self._device)
        everything = group.gather_interleaved(torch.cat(features), settings.num_samples)
        grid = group.gather_interleaved(torch.cat(pictures), shown).cpu()
        metrics = self._measure(everything, diverged) if group.is_main else {}
        metrics = group.from_main({**metrics, "eval_seconds": time.perf_counter() - started})
        return Evaluation(metrics, grid, grid_columns(shown, self._config.data.classes))

    def draw(self, model: nn.Module, indices: Tensor) -> Tensor:
        """The samples of the given numbers, float32 (B, C, H, W): what the data's `to_pixels` takes."""
        config = self._config
        return draw(
            model,
            self._schedule,
            config.sampling,
            config.data.sample_shape,
            seed=config.evaluation.seed,
            indices=indices,
            labels=self._conditions(indices),
            device=self._device,
            bf16=config.training.precision == "bf16",
        )

    def _conditions(self, indices: Tensor) -> Tensor:
        """Labels of the samples (B,), or the tokens of their captions (B, L, D)."""
        captions = self._data.captions
        if captions is None:
            return sample_labels(indices, self._config.data.classes)
        return captions.tokens(captions.of_samples(indices))

    def _measure(self, features: Tensor, diverged: bool) -> dict[str, float]:
        """Everything that was asked for, by its name, of all samples' features (N, D)."""
        settings = self._config.evaluation
        extras = settings.extra_names
        if diverged:
            # Pixels are whole numbers even where samples are not finite, so distances would look like some.
            return dict.fromkeys([settings.metric, *chain.from_iterable(extras.values())], math.nan)
        found = {settings.metric: self._reference.frechet_distance(*statistics(features))}
        for metric, names in extras.items():
            values = MEASURES[metric](features, self._features, self._extractor)
            found.update(zip(names, values, strict=True))
        return found


def grid_columns(num_images: int, num_classes: int) -> int:
    """Columns of a grid of samples: a class each where there are not too many, else about a square."""
    return num_classes if 1 < num_classes <= 20 else math.ceil(math.sqrt(num_images))


def save_grid(images: Tensor, path: Path, columns: int, scale: int | None = None) -> None:
    """Writes images as one PNG, row by row, with a line of one pixel between them.

    Args:
        images: uint8 (n, C, H, W), C 1 or 3.
        path: of the PNG.
        columns: images a row.
        scale: whole factor to enlarge by; default: images narrower than 64 pixels come close to that.
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.zeros(channels, rows * (height + 1) + 1, columns * (width + 1) + 1, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).squeeze(-1).contiguous().numpy())
    scale = scale or max(1, 64 // width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    picture.save(path)
