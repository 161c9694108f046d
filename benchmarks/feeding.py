"""How fast images reach the training loop, against how fast the quickstart's model trains on them.

`python benchmarks/feeding.py`: about three minutes on one core, and 1 GB of disk. Two kinds of data: the
quickstart's pixels (16 x 16, in memory), and latents of 256 x 256 images as `prepare` leaves them (4 x 32 x
32, mean and std, both orientations, float32, shards of 2,048 images). Rates are of the process's own time
where all is in memory, and of wall time from a cold disk: the pages of the shards are given up before. The
second table is of steps of the quickstart's model on those latents (64 tokens), read ahead and not.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from clock import seconds
from loop_overhead import quickstart

from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.config.base import override
from dtr_ray.data import ImageData, load_images
from dtr_ray.data.latents import LatentData
from dtr_ray.data.order import batch_indices
from dtr_ray.data.rows import Rows
from dtr_ray.distributed import Group
from dtr_ray.training.batches import Batches
from dtr_ray.training.prefetch import batches_ahead
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step

_SHARD_IMAGES = 2048
_SHAPE = (2, 2, 4, 32, 32)


def write_shards(folder: Path, num_images: int) -> list[Path]:
    """Latents of random numbers; those that are there already are kept."""
    paths = [folder / f"{number:05d}.npy" for number in range(num_images // _SHARD_IMAGES)]
    for number, path in enumerate(paths):
        if not path.exists():
            values = np.random.default_rng(number).random((_SHARD_IMAGES, *_SHAPE), np.float32)
            np.save(path, values)
    return paths


def make_cold(paths: list[Path]) -> float:
    """Has the system give up the files' pages; returns the share of them that is in memory still."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(paths)


def resident(paths: list[Path]) -> float:
    """Share of the files' pages that are in memory, by mincore of util-linux's `fincore`; NaN without it."""
    if shutil.which("fincore") is None:
        return float("nan")
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return sum(map(int, found)) / sum(path.stat().st_size for path in paths)


def latent_data(paths: list[Path]) -> ImageData:
    """The shards as a trial reads them; no VAE is needed to train."""
    counts = [_SHARD_IMAGES] * len(paths)
    total = sum(counts)
    images = ImageData(None, torch.arange(total) % 10, 10, "random")
    return LatentData(images, Rows(paths, counts, _SHAPE, np.float32), None, 0.18215)


def batches_of(config: TrialConfig, data: ImageData, device: torch.device) -> Batches:
    """As the loop makes them."""
    return Batches(config, data, Group(), device, null_label=10, intervals=None)


def of_latents(config: TrialConfig) -> TrialConfig:
    """The quickstart's model on latents of 256 x 256 images."""
    changes = {
        "data": {"name": "prepared", "path": "none", "resolution": 256, "num_classes": 10, "vae": "none"},
        "data.horizontal_flip": True,
    }
    return TrialConfig.from_dict(override(config.to_dict(), changes))


def step_of(config: TrialConfig, device: torch.device) -> tuple[TrainingState, Callable[..., None]]:
    """A model and its training step."""
    state = TrainingState.build(config, device)
    state.model.train()
    return state, build_step(config, state, Group())


def timed_parts(config: TrialConfig, paths: list[Path]) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed with all in memory: a call that deals with one batch, and how often to repeat it."""
    cpu = torch.device("cpu")
    state, step = step_of(config, cpu)
    pixels = batches_of(config, load_images(config.data, cache_dir()), cpu)
    latents = batches_of(of_latents(config), latent_data(paths), cpu)
    numbers = [count(), count(), count()]

    def train() -> None:
        step(pixels.at(next(numbers[0])))
        state.step += 1

    return {
        "quickstart model trains": (train, 1),
        "(a) feeding its pixels": (lambda: pixels.share(next(numbers[1])), 20),
        "(b) feeding latents, warm": (lambda: latents.share(next(numbers[2])), 5),
    }


def print_rates(config: TrialConfig, paths: list[Path], options: argparse.Namespace) -> float:
    """Prints images a second, trained and fed from memory; returns those trained."""
    size, parts = config.training.batch_size, timed_parts(config, paths)
    for path in paths:
        path.read_bytes()
    for call, _ in parts.values():
        seconds(call, "cpu", 5)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, (call, repeats) in parts.items():
            found[name].append(size / seconds(call, "cpu", repeats * options.steps))
    base = statistics.median(found["quickstart model trains"])
    print(f"{'':28} images a second   times the training")
    for name, values in found.items():
        print(f"{name:28} {statistics.median(values):15.0f}   {statistics.median(values) / base:8.1f}")
    return base


def print_cold_rate(config: TrialConfig, paths: list[Path], base: float) -> None:
    """Prints images a second that come from the disk, in an epoch of all."""
    share, num_steps = make_cold(paths), len(paths) * _SHARD_IMAGES // config.training.batch_size
    batches = batches_of(of_latents(config), latent_data(paths), torch.device("cpu"))
    started = time.perf_counter()
    for number in range(num_steps):
        batches.share(number)
    rate = num_steps * config.training.batch_size / (time.perf_counter() - started)
    name = "(b) from a cold disk, wall"
    print(f"{name:28} {rate:15.0f}   {rate / base:8.1f}   (of the pages {share:.0%} were in memory)")


def print_orders() -> None:
    """Prints what the order of an epoch costs."""
    for num_images in (70_000, 1_281_167):
        seeds = count()
        draw = partial(lambda n, seeds: batch_indices(n, 1, 0, next(seeds)), num_images, seeds)
        print(f"order of an epoch of {num_images:,} images: {1000 * seconds(draw, 'cpu', 5):.1f} ms")


def print_waits(config: TrialConfig, paths: list[Path], options: argparse.Namespace) -> None:
    """Prints how long a step waits for its batch, with batches read ahead and not."""
    device = torch.device(options.device)
    config = of_latents(config)
    state, step = step_of(config, device)

    def measure(ahead: bool) -> tuple[float, float]:
        """Milliseconds a step: waiting, and in all."""
        batches, waited = batches_of(config, latent_data(paths), device), 0.0
        plain = nullcontext(batches.at)
        with batches_ahead(batches, 10**6, always=True) if ahead else plain as batch_at:
            batch_at(0)
            started = time.perf_counter()
            for number in range(1, 1 + options.steps):
                asked = time.perf_counter()
                batch = batch_at(number)
                waited += time.perf_counter() - asked
                step(batch)
                state.step += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
            whole = time.perf_counter() - started
        state.pending.clear()
        return 1000 * waited / options.steps, 1000 * whole / options.steps

    kinds = [(cold, ahead) for cold in (False, True) for ahead in (False, True)]
    found: dict[tuple[bool, bool], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for cold, ahead in kinds:
            if cold:
                make_cold(paths)
            found[cold, ahead].append(measure(ahead))
    print(f"\n{f'milliseconds a step on {device}':34}   wait   whole step")
    for (cold, ahead), values in found.items():
        wait, whole = (statistics.median(column) for column in zip(*values, strict=True))
        name = f"{'cold' if cold else 'warm'}, {'read ahead' if ahead else 'read when asked for'}"
        print(f"{name:34} {wait:6.2f}   {whole:10.2f}")


def main() -> None:
    """Writes the shards, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--images", type=int, default=16384, help="of latents: 64 KB each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--folder", type=Path, help="for the shards, which stay there; default: a temporary one"
    )
    options = parser.parse_args()
    options.weighting = "vanilla"
    torch.set_num_threads(1)
    config = quickstart(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        paths = write_shards(folder, options.images)
        print_cold_rate(config, paths, print_rates(config, paths, options))
        print_orders()
        print_waits(config, paths, options)


if __name__ == "__main__":
    main()
