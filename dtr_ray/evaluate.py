"""`python -m dtr_ray.evaluate CHECKPOINT`: the distance between a model's samples and its data, and more.

With `--metrics` or `--guidance` a table of every metric at every guidance scale; without, one line.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dtr_ray.command import Parser, run_command

if TYPE_CHECKING:
    from dtr_ray.config import TrialConfig
    from dtr_ray.data import ImageData
    from dtr_ray.export.trained import TrainedModel


def main(arguments: list[str] | None = None) -> int:
    """Draws samples, measures them, and prints each metric under its own name."""
    parser = Parser(prog="python -m dtr_ray.evaluate", description="Measure a trained model.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="its checkpoint, export, or trial's folder"
    )
    parser.add_argument("--num-samples", type=int, metavar="N", help="samples to draw")
    parser.add_argument("--features", metavar="NAME", help="inception, or efficientnet_lite0")
    parser.add_argument(
        "--metrics", metavar="A,B", help="beside the distance: kid, inception_score, precision_recall"
    )
    parser.add_argument(
        "--guidance", type=_scales, metavar="1,1.5,2", help="classifier-free guidance: measure at each scale"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="write the figures there, a row a scale")
    parser.add_argument(
        "--save-samples", type=Path, metavar="NPZ", help="write the samples as the ADM evaluation reads them"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _scales(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,1.5,2") from None


def _run(options: argparse.Namespace) -> int:
    _check(options)
    import torch

    from dtr_ray.data import load_images
    from dtr_ray.data.cache import cache_dir
    from dtr_ray.export.trained import open_model

    trained = open_model(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    # All of them before the first sample: a mistake in the last scale must not cost the hours before it.
    configs = [_changed(trained, options, scale) for scale in options.guidance or [None]]
    data = load_images(configs[0].data, cache_dir())
    found: list[dict[str, float]] = []
    for config in configs:
        found.append(_measure(trained, config, data, _samples_path(options, config)))
        if options.output is not None:
            _write_csv(options.output, configs, found)
    if options.metrics is None and options.guidance is None:
        _print_line(trained, configs[0], found[0])
    else:
        _print_table(trained, configs, found)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for what is wrong with the options alone."""
    for name, path, ending in (
        ("output", options.output, ".csv"),
        ("save-samples", options.save_samples, ".npz"),
    ):
        if path is not None and path.suffix.lower() != ending:
            raise ValueError(f"--{name} is {path}: its name must end in {ending}")
    for scale in options.guidance or ():
        if not 1 <= scale < math.inf:
            raise ValueError(f"--guidance {scale:g}: a scale must be at least 1, which is no guidance")
    if options.metrics is not None:
        from dtr_ray.config.errors import suggestion
        from dtr_ray.config.evaluation import ExtraMetric

        known = get_args(ExtraMetric)
        for name in options.metrics.split(","):
            if name not in known:
                raise ValueError(
                    f"--metrics {name}: no metric beside the distance; {suggestion(name, known)}"
                )


def _changed(
    trained: "TrainedModel", options: argparse.Namespace, guidance_scale: float | None
) -> "TrialConfig":
    """The model's configuration, with what the options say."""
    from dtr_ray.config.errors import ConfigError
    from dtr_ray.config.read import change_trial

    given = {
        "--num-samples ": ("evaluation.num_samples", options.num_samples),
        "--features ": ("evaluation.features", options.features),
        "--metrics ": ("evaluation.extra_metrics", options.metrics and f"[{options.metrics}]"),
        "--guidance ": ("sampling.guidance_scale", guidance_scale and f"{guidance_scale:g}"),
    }
    sets = [f"{key}={value}" for key, value in given.values() if value is not None]
    try:
        return change_trial(trained.config, [*options.set, *sets], str(trained.folder))
    except ConfigError as error:
        text = str(error)
        for option, (key, _) in given.items():
            text = text.replace(f"--set {key}=", option)
        raise ConfigError(text) from error


def _measure(
    trained: "TrainedModel", config: "TrialConfig", data: "ImageData", samples_path: Path | None
) -> dict[str, float]:
    """All metrics of one configuration; writes the samples where a path is given."""
    import torch
    from rich.console import Console

    from dtr_ray.distributed import Group
    from dtr_ray.evaluation.evaluate import Evaluator, sample_labels
    from dtr_ray.evaluation.sample_file import SampleFile

    evaluator = Evaluator(config, data, Group(), trained.model.device)
    total, drawn = config.evaluation.num_samples, 0
    # Shown on terminals alone.
    with Console(stderr=True).status("") as status:

        def on_images(images: torch.Tensor) -> None:
            nonlocal drawn
            drawn += len(images)
            status.update(f"guidance {config.sampling.guidance_scale:g}: {drawn:,} of {total:,} samples")

        if samples_path is None:
            return evaluator.evaluate(trained.model, on_images=on_images).metrics
        with SampleFile(samples_path, sample_labels(torch.arange(total), config.data.classes)) as file:

            def keep(images: torch.Tensor) -> None:
                file.add(images)
                on_images(images)

            return evaluator.evaluate(trained.model, on_images=keep).metrics


def _samples_path(options: argparse.Namespace, config: "TrialConfig") -> Path | None:
    """Where the samples go: a file for each scale where there are several."""
    path: Path | None = options.save_samples
    if path is None or len(options.guidance or ()) < 2:
        return path
    return path.with_stem(f"{path.stem}-guidance{config.sampling.guidance_scale:g}")


def _write_csv(path: Path, configs: list["TrialConfig"], found: list[dict[str, float]]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "guidance_scale": config.sampling.guidance_scale,
            "num_samples": config.evaluation.num_samples,
            "sampler": config.sampling.sampler,
            "num_steps": config.sampling.num_steps,
            **metrics,
        }
        for config, metrics in zip(configs, found, strict=False)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _how(config: "TrialConfig") -> str:
    """How the samples were drawn."""
    sampling = config.sampling
    return f"{config.evaluation.num_samples:,} samples, {sampling.sampler} with {sampling.num_steps} steps"


def _print_line(trained: "TrainedModel", config: "TrialConfig", metrics: dict[str, float]) -> None:
    name = config.evaluation.metric
    seconds = f"{metrics['eval_seconds']:.1f} s"
    print(f"{name} {metrics[name]:.6g} ({_how(config)}, {seconds}; {trained.folder})")
    for other, value in metrics.items():
        if other not in (name, "eval_seconds"):
            print(f"{other} {value:.6g}")


def _print_table(
    trained: "TrainedModel", configs: list["TrialConfig"], found: list[dict[str, float]]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("guidance", no_wrap=True)
    for config in configs:
        table.add_column(f"{config.sampling.guidance_scale:g}", justify="right", no_wrap=True)
    for name in found[0]:
        figures = [
            f"{metrics[name]:.1f}" if name == "eval_seconds" else f"{metrics[name]:.5g}" for metrics in found
        ]
        table.add_row(name, *figures)
    console = Console()
    console.print(f"{_how(configs[0])}; {trained.folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
