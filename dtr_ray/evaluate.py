"""`python -m dtr_ray.evaluate CHECKPOINT`: the distance between a model's samples and its data."""

import argparse
import sys
from pathlib import Path

from dtr_ray.command import Parser, run_command


def main(arguments: list[str] | None = None) -> int:
    """Draws samples, measures them, and prints the metric under its own name."""
    parser = Parser(prog="python -m dtr_ray.evaluate", description="Measure a trained model.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="its checkpoint, export, or trial's folder"
    )
    parser.add_argument("--num-samples", type=int, metavar="N", help="samples to draw")
    parser.add_argument("--features", metavar="NAME", help="inception, or efficientnet_lite0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    import torch

    from dtr_ray.config.read import change_trial
    from dtr_ray.data import load_images
    from dtr_ray.data.cache import cache_dir
    from dtr_ray.distributed import Group
    from dtr_ray.evaluation.evaluate import Evaluator
    from dtr_ray.export.trained import open_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_model(options.checkpoint, device)
    sets = list(options.set)
    if options.num_samples is not None:
        sets.append(f"evaluation.num_samples={options.num_samples}")
    if options.features is not None:
        sets.append(f"evaluation.features={options.features}")
    config = change_trial(trained.config, sets, str(trained.folder))
    evaluator = Evaluator(config, load_images(config.data, cache_dir()), Group(), device)
    metrics = evaluator.evaluate(trained.model).metrics
    name = config.evaluation.metric
    print(
        f"{name} {metrics[name]:.6g} ({config.evaluation.num_samples:,} samples, "
        f"{config.sampling.sampler} with {config.sampling.num_steps} steps, "
        f"{metrics['eval_seconds']:.1f} s; {trained.folder})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
