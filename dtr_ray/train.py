"""`python -m dtr_ray.train TRIAL.yaml`: one trial in this process, without Ray."""

import argparse
import shlex
import sys
from pathlib import Path

from dtr_ray.command import Parser, run_command


def main(arguments: list[str] | None = None) -> int:
    """Trains what the file describes, and prints each evaluation."""
    parser = Parser(prog="python -m dtr_ray.train", description="Train one model, without Ray.")
    parser.add_argument("trial", type=Path, metavar="TRIAL.yaml", help="the trial's configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument("--output", type=Path, metavar="DIR", help="its folder; default: runs/TRIAL")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    typed = shlex.join(word for word in words if word != "--resume")
    return run_command(lambda: _run(options), resume=f"{parser.prog} {typed} --resume")


def _run(options: argparse.Namespace) -> int:
    from dtr_ray.config.read import read_trial

    config = read_trial(options.trial, options.set)
    folder = options.output or Path("runs") / options.trial.stem

    import torch

    from dtr_ray.cache import cache_dir
    from dtr_ray.data import check_data, load_images
    from dtr_ray.diffusion.intervals import check_intervals
    from dtr_ray.evaluation.references import check_references
    from dtr_ray.training import Observer, train
    from dtr_ray.training.folder import claim_folder

    check_data(config.data)
    check_references(config.data, config.evaluation.features)
    check_intervals(config.weighting, config.diffusion)
    claim_folder(folder, config, resume=options.resume)

    class Printer(Observer):
        """Prints the numbers of training."""

        def metrics(self, step: int, values: dict[str, float]) -> None:
            """One line a record."""
            rest = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{config.training.num_steps}: {rest}", flush=True)

    data = load_images(config.data, cache_dir())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for report in train(config, folder, data, device=device, observer=Printer()):
        done = f"step {report.step}/{config.training.num_steps}"
        metric = config.evaluation.metric_at(report.step)
        print(f"{done}: {metric} {report.metrics[metric]:.6g}", flush=True)
    print(f"\nresults  {folder}")
    print(f"samples  python -m dtr_ray.sample {shlex.quote(str(folder))} --output samples.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
