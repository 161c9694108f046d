"""Where the time of an evaluation goes, against the way it was and the plain way.

    python benchmarks/evaluation.py [--num-samples 1000] [--threads 1] [--steps 20] [--features inception]

Three ways to the Fréchet distance of the same model's samples to the same digits, with the same network:

- plain: all samples are drawn, written as PNGs into a folder, and clean-fid measures it against a folder of
  the digits as PNGs (its own reading, resize and distance; the statistics of the digits are known before);
- before: in memory, 250 samples at a time; resized one by one, then the network, then the distance by the
  decomposition of a matrix of D x D;
- now: the Evaluator, with the distance's standard error.

The model is the quickstart's, untrained: its time does not depend on its weights. In the place of clean-fid's
Inception is torchvision's, as large, with random weights. CPU time of the process on a CPU, wall time
on a GPU.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from cleanfid import fid
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.data import ImageData, load_images
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.evaluation.features import EfficientNetLite0, Extractor, Inception
from dtr_ray.evaluation.frechet import frechet_distance_to, statistics
from dtr_ray.evaluation.references import reference_statistics
from dtr_ray.models import build_model

PARTS = ("sampling", "decoding", "features", "distance", "waiting")


class StandIn(Inception):
    """Inception's resize, and torchvision's network of the same architecture with random weights."""

    name = "inception"

    def __init__(self, device: torch.device) -> None:
        Extractor.__init__(self, device)
        from cleanfid.resize import build_resizer

        self._resize = build_resizer("clean")
        torch.manual_seed(0)
        model = torchvision.models.inception_v3(
            weights=None, init_weights=False, transform_input=False, aux_logits=False
        )
        model.fc = nn.Identity()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        # Statistics that fit the random weights, or nothing would be left of an image after 94 layers.
        model.train().requires_grad_(False)(torch.randn(8, 3, 299, 299))
        self._layers = model.eval().to(device, memory_format=torch.channels_last)


class Clock:
    """Seconds of named parts."""

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.found[name] = self.found.get(name, 0.0) + self.now() - started


class Bench:
    """One model, one set of digits, one network."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = TrialConfig.from_dict(
            {
                "data": {"name": "mnist", "resolution": 16},
                "model": {"name": "DiT", "hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 4},
                "training": {"precision": "bf16"},
                "sampling": {"sampler": "dpm_solver++", "num_steps": options.steps},
                "evaluation": {"num_samples": options.num_samples, "features": options.features},
            }
        )
        digits = load_images(self.config.data, cache_dir())
        chosen = torch.arange(options.num_samples)
        name = f"benchmark-{options.num_samples}"
        self.data = ImageData(digits.pixels(chosen).numpy(), digits.labels[chosen], 10, name)
        kinds: dict[str, Any] = {"inception": StandIn, "efficientnet_lite0": EfficientNetLite0}
        self.extractor: Extractor = kinds[options.features](self.device)
        torch.manual_seed(0)
        self.model = build_model(self.config.resolved_model).eval().to(self.device)
        self.evaluator = Evaluator(self.config, self.data, Group(), self.device, self.extractor)
        self.reference = reference_statistics(self.data, self.extractor, cache_dir())

    def batches(self, clock: Clock) -> Iterator[Tensor]:
        """uint8 images, 250 at a time."""
        for indices in torch.arange(self.config.evaluation.num_samples).split(250):
            with clock.part("sampling"):
                x = self.evaluator.draw(self.model, indices)
            with clock.part("decoding"):
                images = self.data.to_pixels(x)
            yield images

    def plain(self, clock: Clock) -> float:
        """PNGs and clean-fid; its own network's place is taken by ours, which gets its resized images."""
        with tempfile.TemporaryDirectory() as folder:
            for batch in self.batches(clock):
                with clock.part("decoding"):
                    self._write(batch, Path(folder))
            with clock.part("features"):
                found = fid.get_folder_features(
                    folder,
                    self._network,
                    num_workers=0,
                    batch_size=32,
                    device=self.device,
                    custom_fn_resize=self._resizer(),
                    verbose=False,
                )
        with clock.part("distance"):
            mu, sigma = np.mean(found, axis=0), np.cov(found, rowvar=False)
            return float(fid.frechet_distance(mu, sigma, self.reference.mu, self.reference.sigma))

    def before(self, clock: Clock) -> float:
        """In memory, one thing after another."""
        parts = []
        for images in self.batches(clock):
            with clock.part("features"):
                parts.append(self.extractor(images))
        with clock.part("distance"):
            mu, sigma = statistics(torch.cat(parts))
            reference = self.reference
            return frechet_distance_to(reference.mu, reference.sigma, reference.root, mu, sigma)

    def now(self, clock: Clock) -> float:
        """The Evaluator; its own stopwatch tells the shares of what the clock finds in all."""
        started = clock.now()
        found = self.evaluator.evaluate(self.model)
        total, wall = clock.now() - started, sum(found.seconds.values())
        clock.found |= {name: total * seconds / wall for name, seconds in found.seconds.items()}
        return found.metrics[self.config.evaluation.metric]

    def _write(self, images: Tensor, folder: Path) -> None:
        first = len(list(folder.iterdir()))
        for number, image in enumerate(images.cpu(), first):
            Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()).save(
                folder / f"{number:06}.png"
            )

    def _resizer(self) -> Any:
        # clean-fid resizes to Inception's 299 unless told otherwise.
        return None if isinstance(self.extractor, Inception) else (lambda image: image.astype(np.float32))

    def _network(self, batch: Tensor) -> Tensor:
        if isinstance(self.extractor, Inception):
            return self.extractor.network(batch.permute(0, 2, 3, 1))
        return self.extractor(batch.to(torch.uint8))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Where the time of an evaluation goes.")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--features", choices=("inception", "efficientnet_lite0"), default="inception")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    ways = {"plain": bench.plain, "before": bench.before, "now": bench.now}
    clocks = {name: Clock(bench.device) for name in ways}
    distances = {name: way(clocks[name]) for name, way in ways.items()}
    totals = {name: sum(clock.found.values()) for name, clock in clocks.items()}
    table = Table("", *(f"{part}" for part in PARTS), "seconds", "ratio to plain", "distance")
    for name, clock in clocks.items():
        shares = [f"{clock.found.get(part, 0.0) / totals[name]:.1%}" for part in PARTS]
        ratio = f"{totals[name] / totals['plain']:.2f}"
        table.add_row(name, *shares, f"{totals[name]:.1f}", ratio, f"{distances[name]:.6g}")
    console = Console(width=120)
    console.print(f"{options.num_samples} samples, {options.steps} steps, {options.features}, {bench.device}")
    console.print(table)


if __name__ == "__main__":
    main()
