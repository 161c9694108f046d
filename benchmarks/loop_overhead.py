"""What the training loop adds to forward, backward and optimizer: drawing batches, EMA, losses, progress.

`python benchmarks/loop_overhead.py`: about a minute on one core, on the quickstart's model and digits.
Parts are timed in turn within each round, so that other work on the machine weighs on all alike; on the CPU
it is the process's own time that counts.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import count

import torch
from clock import seconds

from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.data import load_images
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.diffusion.weightings import WEIGHTINGS
from dtr_ray.distributed import Group
from dtr_ray.training.batches import Batches
from dtr_ray.training.loop import check_losses
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step


def quickstart(options: argparse.Namespace) -> TrialConfig:
    """The model, data and training of search_spaces/quickstart.yaml."""
    return TrialConfig.from_dict(
        {
            "data": {"name": "mnist", "resolution": 16},
            "model": {"name": "DiT", "hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 4},
            "weighting": {"name": options.weighting},
            "training": {
                "batch_size": 64,
                "lr": 2e-3,
                "ema_decay": 0.999,
                "ema_warmup": True,
                "precision": options.precision,
            },
        }
    )


def parts(config: TrialConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; `whole step` is all that the loop does in one step."""
    state, group = TrainingState.build(config, device), Group()
    intervals = None if state.balancer is None else state.balancer.intervals
    data = load_images(config.data, cache_dir())
    batches = Batches(config, data, group, device, null_label=10, intervals=intervals)
    step = build_step(config, state, group)
    bare = TrainingState.build(config, device)
    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps).to(device)
    fixed, numbers = batches.at(0), count()

    def bare_step() -> None:
        bf16 = config.training.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            arguments = (bare.model, schedule, fixed.x, fixed.t, fixed.noise, {"y": fixed.conditions})
            loss = diffusion_losses(*arguments)["loss"].mean()
        loss.backward()
        bare.optimizer.step()
        bare.optimizer.zero_grad(set_to_none=True)

    def whole_step() -> None:
        step(batches.at(next(numbers)))
        state.step += 1
        if state.step % config.training.log_every_steps == 0:
            check_losses(state, group)
            state.losses.clear()

    return {
        "forward, backward, AdamW": bare_step,
        "whole step": whole_step,
        "drawing a batch": lambda: batches.at(next(numbers)),
        "EMA": lambda: bare.update_ema(0.999),
    }


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--weighting", choices=list(WEIGHTINGS), default="vanilla")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    timed = parts(quickstart(options), device)
    for part in timed.values():
        seconds(part, device, 3)
    rounds = [
        {name: seconds(part, device, options.repeats) for name, part in timed.items()}
        for _ in range(options.rounds)
    ]
    base = "forward, backward, AdamW"
    print(f"{'':26} ms a step   share of forward, backward, AdamW")
    for name in timed:
        ms = statistics.median(found[name] for found in rounds) * 1000
        share = statistics.median(found[name] / found[base] for found in rounds)
        print(f"{name:26} {ms:9.2f}   {share:.3f}")


if __name__ == "__main__":
    main()
