"""Evaluator: draws the same samples from any model, once, and measures on them all that was asked for.

Noise and label (or caption) of sample i depend on (evaluation.seed, i) alone, and samples pass the networks
in blocks of a fixed composition: no figure depends on the trial, the batch size or the number of workers, so
that differences between trials are not luck.
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

from dtr_ray.cache import cache_dir
from dtr_ray.config import SamplingConfig, TrialConfig
from dtr_ray.data import ImageData
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.disk import make_folder_durably, sync
from dtr_ray.distributed import Group
from dtr_ray.evaluation.blocks import BLOCK_IMAGES, Blocks
from dtr_ray.evaluation.extras import MEASURES, needs_features
from dtr_ray.evaluation.features import Extractor, build_extractor
from dtr_ray.evaluation.overlap import FeatureStage
from dtr_ray.evaluation.references import reference_features, reference_statistics
from dtr_ray.evaluation.timing import Stopwatch

MIN_SAMPLES = 3
"""Of a standard error: each sample is left out in turn, and a covariance takes two."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    metrics: dict[str, float]
    """The distance, its standard error and extrapolation, and the extra metrics, each under its own name and
    NaN where a sample is not finite; and `eval_seconds`."""
    grid: Tensor
    """The first samples, uint8 (n, C, H, W)."""
    columns: int
    seconds: dict[str, float]
    """Where `eval_seconds` went on the main worker: `sampling`, `decoding`, `features`, `distance`, and
    `waiting` for the other workers, or for images to be resized."""

    def save_grid(self, path: Path) -> None:
        """Has the samples on the disk as one PNG, row by row, in a folder that is made for it."""
        make_folder_durably(path.parent)
        save_grid(self.grid, path, self.columns)
        sync(path)
        sync(path.parent)


@lru_cache(maxsize=2)
def shared_extractor(name: str, weights: str | None, device: str) -> Extractor:
    """An extractor that trials which follow one another in a process share: loading takes a second."""
    return build_extractor(name, weights, device)


def sample_labels(indices: Tensor, num_classes: int) -> Tensor:
    """Labels of the samples of the given numbers, int64 (B,): the classes in turn."""
    return indices % num_classes


@dataclass(frozen=True)
class _Plan:
    """What is drawn and reported: the full evaluation, or its proxy."""

    num_samples: int
    sampling: SamplingConfig
    metric: str
    is_proxy: bool

    @classmethod
    def of(cls, config: TrialConfig, proxy: bool) -> "_Plan":
        full = cls(config.evaluation.num_samples, config.sampling, config.evaluation.metric, False)
        if not proxy:
            return full
        cheaper, metric = config.evaluation.proxy, config.evaluation.proxy_metric
        if cheaper is None or metric is None:
            raise ValueError("evaluation.proxy is not set: there is no proxy to evaluate")
        changed = {"sampler": cheaper.sampler, "num_steps": cheaper.num_steps}
        sampling = full.sampling.model_copy(update={k: v for k, v in changed.items() if v is not None})
        return cls(cheaper.num_samples or full.num_samples, sampling, metric, True)


class Evaluator:
    """Evaluates models of one trial; the data's statistics are computed once per data set and cached."""

    def __init__(
        self,
        config: TrialConfig,
        data: ImageData,
        group: Group,
        device: torch.device,
        extractor: Extractor | None = None,
    ) -> None:
        """For a trial's models, on the workers of a group; `extractor`: in place of the configured one."""
        self.group = group
        self._config = config
        self._data = data
        self._device = device
        settings = config.evaluation
        self._extractor = extractor or shared_extractor(
            settings.features, settings.feature_weights, str(device)
        )
        # Before the statistics, which need no second look at the images then.
        wanted = needs_features(settings.extra_metrics, len(data))
        self._features = reference_features(data, self._extractor, cache_dir()) if wanted else None
        self._reference = reference_statistics(data, self._extractor, cache_dir(), features=self._features)
        self._schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)

    def evaluate(
        self,
        model: nn.Module,
        on_batch: Callable[[], None] = lambda: None,
        on_images: Callable[[Tensor, Tensor], None] = lambda indices, images: None,
        *,
        proxy: bool = False,
    ) -> Evaluation:
        """Draws `evaluation.num_samples` samples; all workers take part and get the same answer.

        Args:
            model: in evaluation mode, on this worker's device.
            on_batch: called after each of this worker's blocks of samples.
            on_images: called before with their numbers, int64 (B,), and images, uint8 (B, C, H, W), in order.
            proxy: draw as `evaluation.proxy` says, and report its distance alone, under its own name.

        Raises:
            ValueError: a proxy is asked for, but none is configured.
        """
        started = time.perf_counter()
        plan, group, stopwatch = _Plan.of(self._config, proxy), self.group, Stopwatch(self._device)
        blocks = Blocks(plan.num_samples, group)
        shown = min(self._config.evaluation.grid_images, plan.num_samples)
        pictures, finite = [], [torch.ones((), dtype=torch.bool, device=self._device)]
        with self._features_of(stopwatch) as stage:
            for indices in blocks.mine():
                with stopwatch.part("sampling"):
                    x = self.draw(model, indices, plan.sampling)
                finite.append(x.isfinite().all())
                with stopwatch.part("decoding"):
                    images = self._data.to_pixels(x)
                stage.add(images)
                pictures.append(images[: max(0, shown - int(indices[0]))])
                on_images(indices, images)
                on_batch()
            features = stage.finish()
        diverged = group.any(not torch.stack(finite).all(), self._device)
        everything = blocks.gather(features, self._no_features())
        grid = Blocks(shown, group).gather([p for p in pictures if len(p)], self._no_images()).cpu()
        metrics: dict[str, float] = {}
        if group.is_main:
            with stopwatch.part("distance", on_host=True):
                metrics = self._measure(everything, plan, diverged)
        seconds = stopwatch.seconds()
        metrics = group.from_main({**metrics, "eval_seconds": time.perf_counter() - started})
        columns = grid_columns(shown, self._config.data.classes)
        return Evaluation(metrics, grid, columns, group.from_main(seconds))

    def draw(self, model: nn.Module, indices: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """The samples of the given numbers, float32 (B, C, H, W): what the data's `to_pixels` takes.

        Args:
            model: as for `evaluate`.
            indices: numbers of the samples, int64 (B,).
            sampling: default: the trial's.
        """
        config = self._config
        return draw(
            model,
            self._schedule,
            sampling or config.sampling,
            config.data.sample_shape,
            seed=config.evaluation.seed,
            indices=indices,
            labels=self._conditions(indices),
            device=self._device,
            bf16=config.training.precision == "bf16",
        )

    def _features_of(self, stopwatch: Stopwatch) -> FeatureStage:
        """Where images become features: while the next are drawn, where the CPU has a share in it."""
        threaded = self._device.type == "cuda" and self._extractor.prepares_on_cpu
        max_waiting = max(1, self._config.evaluation.batch_size // BLOCK_IMAGES)
        return FeatureStage(self._extractor, stopwatch, max_waiting=max_waiting, threaded=threaded)

    def _no_features(self) -> Tensor:
        return torch.empty(0, self._extractor.num_features, device=self._device)

    def _no_images(self) -> Tensor:
        side = self._config.data.resolution
        return torch.empty(0, self._data.num_channels, side, side, dtype=torch.uint8, device=self._device)

    def _conditions(self, indices: Tensor) -> Tensor:
        """Labels of the samples (B,), or the tokens of their captions (B, L, D)."""
        captions = self._data.captions
        if captions is None:
            return sample_labels(indices, self._config.data.classes)
        return captions.tokens(captions.of_samples(indices))

    def _measure(self, features: Tensor, plan: _Plan, diverged: bool) -> dict[str, float]:
        """Everything that was asked for, by its name, of all samples' features (N, D)."""
        extras = {} if plan.is_proxy else self._config.evaluation.extra_names
        distances = self._distance_names(plan)
        if diverged:
            # Pixels are whole numbers even where samples are not finite, so distances would look like some.
            return dict.fromkeys([*distances.values(), *chain.from_iterable(extras.values())], math.nan)
        if list(distances) == ["distance"]:
            found = {plan.metric: self._reference.frechet_distance_of(features)}
        else:
            estimate = self._reference.frechet_estimate(features, self._strata(plan))
            found = {name: getattr(estimate, field) for field, name in distances.items()}
        for metric, names in extras.items():
            values = MEASURES[metric](features, self._features, self._extractor)
            found.update(zip(names, values, strict=True))
        return found

    def _distance_names(self, plan: _Plan) -> dict[str, str]:
        """Names of what is reported of the distance, by the fields of a `FrechetEstimate`."""
        settings, names = self._config.evaluation, {"distance": plan.metric}
        if settings.standard_error and plan.num_samples >= MIN_SAMPLES:
            names["standard_error"] = f"{plan.metric}_stderr"
        if settings.extrapolate and not plan.is_proxy:
            names["infinity"] = settings.infinity_name
        return names

    def _strata(self, plan: _Plan) -> Tensor | None:
        """The samples' classes, where there are some: in turn, they are less noisy than classes by chance."""
        classes = self._config.data.classes
        return sample_labels(torch.arange(plan.num_samples), classes) if classes > 1 else None


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
