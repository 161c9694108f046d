"""`python -m dtr_ray.sample CHECKPOINT --output grid.png`: a picture of a model's samples."""

import argparse
import sys
from pathlib import Path

from dtr_ray.command import Parser, run_command


def main(arguments: list[str] | None = None) -> int:
    """Draws samples and writes them as one PNG."""
    parser = Parser(prog="python -m dtr_ray.sample", description="Draw samples from a trained model.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="its checkpoint, export, or trial's folder"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--labels", type=_labels, metavar="0,1,2", help="classes in turn; default: all")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a caption, for a model of captions; repeatable",
    )
    parser.add_argument("--num", type=int, metavar="N", help="images; default: as in the trial's own grids")
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise; default: the evaluation's")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance; 1 is none")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the sampler")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def _run(options: argparse.Namespace) -> int:
    for name, least in (("num", 1), ("seed", 0), ("steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: it must be at least {least}")
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"--output is {options.output}: the picture is a PNG, so its name must end in .png")
    import torch

    from dtr_ray.evaluation.evaluate import grid_columns, save_grid
    from dtr_ray.export.trained import build_pipeline, open_model

    trained = open_model(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    count = options.num or trained.config.evaluation.grid_images
    labels = options.labels and [options.labels[i % len(options.labels)] for i in range(count)]
    prompts = options.prompt and [options.prompt[i % len(options.prompt)] for i in range(count)]
    pipeline = build_pipeline(trained, options.prompt)
    images = pipeline(
        labels,
        count,
        prompt=prompts,
        seed=options.seed,
        guidance_scale=options.guidance,
        num_inference_steps=options.steps,
        output_type="pt",
    ).images
    asked = options.labels or options.prompt
    num_classes = len(asked) if asked else trained.config.data.classes
    options.output.parent.mkdir(parents=True, exist_ok=True)
    columns = min(count, grid_columns(count, num_classes))
    save_grid((images * 255).round().to(torch.uint8), options.output, columns)
    print(f"{options.output}: {count} samples of {trained.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
