"""What balancers cost: a training step of each over a plain one, and over the naive way to K gradients.

`python benchmarks/balancers.py`: about a minute on one core, on the quickstart's model. The naive way is one
forward of the whole batch and K backward passes through it. Steps are timed in turn within each round, so
that other work on the machine weighs on all alike; on the CPU it is the process's own time that counts.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from itertools import cycle

import torch
from clock import seconds
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.diffusion.balancers import GradientBalancer
from dtr_ray.diffusion.intervals import stratified_timesteps, uniform_intervals
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.training.batches import Batch
from dtr_ray.training.interval_gradients import IntervalGradients
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step

NAMES = ["plain", "ant_uw", "ant_pcgrad", "ant_nash", "ant_nash, every 25 steps", "naive ant_pcgrad"]


def config_of(options: argparse.Namespace, name: str) -> TrialConfig:
    """A trial of the sizes asked for."""
    weighting: dict[str, object] = {"name": "vanilla"}
    if name != "plain":
        weighting = {"name": name.removeprefix("naive ").split(",")[0], "num_clusters": options.clusters}
    if "every" in name:
        weighting["every_steps"] = 25
    return TrialConfig.from_dict(
        {
            "data": {"name": "mnist", "resolution": 16},
            "model": {
                "name": "DiT",
                "hidden_size": options.hidden_size,
                "depth": options.depth,
                "num_heads": 4,
                "patch_size": options.patch_size,
            },
            "weighting": weighting,
            "training": {"batch_size": options.batch_size, "lr": 1e-4, "precision": options.precision},
        }
    )


def some_batches(options: argparse.Namespace, device: torch.device) -> Iterable[Batch]:
    """Made once: drawing batches is not what is timed."""
    size, clusters = options.batch_size, options.clusters
    generator, intervals = torch.Generator().manual_seed(0), uniform_intervals(1000, clusters)
    batches = []
    for _ in range(4):
        t, cluster = stratified_timesteps(intervals, size, generator)
        images = torch.randn(2, size, 1, 16, 16, generator=generator).to(device)
        labels = torch.randint(10, (size,), generator=generator).to(device)
        counts = torch.bincount(cluster, minlength=clusters)
        stops = counts.cumsum(0)
        spans = tuple(zip((stops - counts).tolist(), stops.tolist(), strict=True))
        tensors = t.to(device), images[1], cluster.to(device), counts.to(device)
        batches.append(Batch(images[0], labels, *tensors, spans))
    return cycle(batches)


def naive_step(config: TrialConfig, state: TrainingState) -> Callable[[Batch], None]:
    """PCGrad from one forward, and a backward pass through all of it for each interval."""
    balancer = state.balancer
    assert isinstance(balancer, GradientBalancer)
    schedule = noise_schedule("cosine", 1000).to(state.device)
    buffer = IntervalGradients(list(state.model.parameters()), len(balancer.intervals))

    def step(batch: Batch) -> None:
        buffer.clear()
        with torch.autocast(state.device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
            inputs = batch.x, batch.t, batch.noise, {"y": batch.conditions}
            losses = diffusion_losses(state.model, schedule, *inputs)["loss"]
        for interval, (start, stop) in enumerate(batch.spans):
            buffer.collect(interval)
            last = interval == len(batch.spans) - 1
            losses[start:stop].mean().backward(retain_graph=not last)
        counts: Tensor | None = batch.counts
        assert counts is not None
        buffer.combine(balancer.weigh(buffer.sum_over(Group()), counts, 0, state.step))
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.update_ema(0.999)

    return step


def make_step(options: argparse.Namespace, name: str, device: torch.device) -> Callable[[], None]:
    """One way to make a step, as a function that makes one."""
    config = config_of(options, name)
    state = TrainingState.build(config, device)
    state.model.train()
    naive = name.startswith("naive")
    step = naive_step(config, state) if naive else build_step(config, state, Group())
    batches = iter(some_batches(options, device))

    def make() -> None:
        step(next(batches))
        state.step += 1
        state.pending.clear()

    return make


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=1, help="steps a round; 10 or more on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=8)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    steps = {name: make_step(options, name, device) for name in NAMES}
    for step in steps.values():
        seconds(step, device, 2)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(options.rounds):
        # Every other round backwards: no step always follows the same one.
        for name in NAMES[:: 1 if number % 2 == 0 else -1]:
            # A round of these has one step with new weights.
            repeats = 25 if "every" in name else options.repeats
            times[name].append(seconds(steps[name], device, repeats))
    print(
        f"hidden {options.hidden_size}, depth {options.depth}, {(16 // options.patch_size) ** 2} tokens, "
        f"batch {options.batch_size}, K {options.clusters}, {options.precision}, {device}, "
        f"torch {torch.__version__}, {options.rounds} rounds"
    )
    print(f"{'step':26}{'ms (median)':>12}{'over plain':>12}{'lowest':>8}{'highest':>8}")
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["plain"], strict=True)]
        middle = statistics.median(ratios)
        print(
            f"{name:26}{1000 * statistics.median(found):12.1f}{middle:12.2f}"
            f"{min(ratios):8.2f}{max(ratios):8.2f}"
        )


if __name__ == "__main__":
    main()
