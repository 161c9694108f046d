"""`python -m dtr_ray.evaluate CHECKPOINT`: the distance between a model's samples and its data, and more.

With `--metrics` or `--guidance` a table of every metric at every guidance scale; without, a line for each.
"""

import argparse
import csv
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dtr_ray.command import Parser, add_model, model_folder, run_command

if TYPE_CHECKING:
    import torch

    from dtr_ray.config import TrialConfig
    from dtr_ray.data import ImageData
    from dtr_ray.distributed import Group
    from dtr_ray.evaluation.evaluate import Evaluation
    from dtr_ray.evaluation.sample_file import SampleParts
    from dtr_ray.export.trained import TrainedModel

# What an evaluation found, as JSON keeps it: `metrics` and `seconds`.
Found = dict[str, dict[str, float]]


def main(arguments: list[str] | None = None) -> int:
    """Draws samples, measures them, and prints each metric under its own name."""
    parser = Parser(prog="python -m dtr_ray.evaluate", description="Measure a trained model.")
    add_model(parser)
    parser.add_argument("--num-samples", type=int, metavar="N", help="samples to draw")
    parser.add_argument("--features", metavar="NAME", help="inception, or efficientnet_lite0")
    parser.add_argument(
        "--metrics", metavar="A,B", help="beside the distance: kid, inception_score, precision_recall"
    )
    parser.add_argument(
        "--guidance", type=_scales, metavar="1,1.5,2", help="classifier-free guidance: measure at each scale"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a GPU, or one")
    parser.add_argument("--timings", action="store_true", help="print where the time went")
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
    from dtr_ray.evaluation.references import check_references
    from dtr_ray.evaluation.sample_file import SampleParts
    from dtr_ray.evaluation.workers import check_workers, default_workers, run_group
    from dtr_ray.export.trained import find_model, read_config

    num_workers = default_workers() if options.workers is None else options.workers
    check_workers(num_workers)
    folder = find_model(model_folder(options))
    # All of them before the first sample: a mistake in the last scale must not cost the hours before it.
    configs = [_changed(read_config(folder), folder, options, scale) for scale in options.guidance or [None]]
    check_references(configs[0].data, configs[0].evaluation.features)
    saved = options.save_samples
    with SampleParts.beside(saved) if saved is not None else nullcontext() as parts:
        work = (folder, configs, options, parts)
        found: list[Found] = run_group(_measure_all, work, num_workers)
    if options.metrics is None and options.guidance is None:
        _print_lines(folder, configs[0], found[0]["metrics"])
    else:
        _print_table(folder, configs, [one["metrics"] for one in found])
    if options.timings:
        for one in found:
            _print_timings(one["seconds"])
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
    config: "TrialConfig", folder: Path, options: argparse.Namespace, guidance_scale: float | None
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
        changed = change_trial(config, [*options.set, *sets], str(folder))
    except ConfigError as error:
        text = str(error)
        for option, (key, _) in given.items():
            text = text.replace(f"--set {key}=", option)
        raise ConfigError(text) from error
    told = any(text.partition("=")[0].strip() == "evaluation.extrapolate" for text in options.set)
    if told or not changed.evaluation.can_extrapolate:
        return changed
    # A look at one model wants what a sweep does not decide by.
    evaluation = changed.evaluation.model_copy(update={"extrapolate": True})
    return changed.model_copy(update={"evaluation": evaluation})


def _measure_all(
    group: "Group",
    device: "torch.device",
    folder: Path,
    configs: list["TrialConfig"],
    options: argparse.Namespace,
    parts: "SampleParts | None",
) -> list[Found]:
    """As one worker of a group: all evaluations, one after another; `parts` takes samples to be saved."""
    from dtr_ray.cache import cache_dir
    from dtr_ray.data import load_images
    from dtr_ray.export.trained import open_model

    trained = open_model(folder, device)
    data = load_images(configs[0].data, cache_dir())
    found: list[Found] = []
    for number, config in enumerate(configs):
        own_parts = None if parts is None else parts.part(str(number))
        evaluation = _measure(trained, config, data, group, own_parts)
        found.append({"metrics": evaluation.metrics, "seconds": evaluation.seconds})
        if own_parts is not None and group.is_main:
            _save_samples(own_parts, _samples_path(options, config), config)
        if options.output is not None and group.is_main:
            _write_csv(options.output, configs, [one["metrics"] for one in found])
    return found


def _measure(
    trained: "TrainedModel",
    config: "TrialConfig",
    data: "ImageData",
    group: "Group",
    parts: "SampleParts | None",
) -> "Evaluation":
    """All metrics of one configuration; the samples go to `parts`, too."""
    from rich.console import Console

    from dtr_ray.evaluation.evaluate import Evaluator

    evaluator, total = Evaluator(config, data, group, trained.model.device), config.evaluation.num_samples
    # Shown on terminals alone.
    with Console(stderr=True, quiet=not group.is_main).status("") as status:

        def on_images(indices: "torch.Tensor", images: "torch.Tensor") -> None:
            if parts is not None:
                parts.write(indices, images)
            drawn = int(indices[-1]) + 1
            status.update(f"guidance {config.sampling.guidance_scale:g}: {drawn:,} of {total:,} samples")

        return evaluator.evaluate(trained.model, on_images=on_images)


def _save_samples(parts: "SampleParts", path: Path, config: "TrialConfig") -> None:
    import torch

    from dtr_ray.evaluation.evaluate import sample_labels

    parts.join(path, sample_labels(torch.arange(config.evaluation.num_samples), config.data.classes))


def _samples_path(options: argparse.Namespace, config: "TrialConfig") -> Path:
    """Where the samples go: a file for each scale where there are several."""
    path: Path = options.save_samples
    if len(options.guidance or ()) < 2:
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


def _print_lines(folder: Path, config: "TrialConfig", metrics: dict[str, float]) -> None:
    metrics, name = dict(metrics), config.evaluation.metric
    seconds = metrics.pop("eval_seconds")
    error = metrics.pop(config.evaluation.standard_error_name, None)
    noise = "" if error is None else f" ± {error:.2g}"
    print(f"{name} {metrics.pop(name):.6g}{noise} ({_how(config)}, {seconds:.1f} s; {folder})")
    for other, value in metrics.items():
        print(f"{other} {value:.6g}")


def _print_timings(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    shares = [f"{name} {s:.1f} s ({s / total:.0%})" for name, s in seconds.items()]
    print(f"time: {', '.join(shares)}")


def _print_table(folder: Path, configs: list["TrialConfig"], found: list[dict[str, float]]) -> None:
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
    console.print(f"{_how(configs[0])}; {folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
