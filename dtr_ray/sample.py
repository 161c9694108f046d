"""`python -m dtr_ray.sample CHECKPOINT --output grid.png`: a model's samples, as a picture or as arrays."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtr_ray.command import Parser, add_model, model_folder, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dtr_ray.distributed import Group
    from dtr_ray.evaluation.sample_file import SampleParts

_ENDINGS = (".png", ".npz")


def main(arguments: list[str] | None = None) -> int:
    """Draws samples and writes them as one PNG, or as an `.npz` that the ADM evaluation reads."""
    parser = Parser(prog="python -m dtr_ray.sample", description="Draw samples from a trained model.")
    add_model(parser)
    what = "what to write: a picture (.png), or arrays (.npz)"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=what)
    parser.add_argument("--labels", type=_labels, metavar="0,1,2", help="classes in turn; default: all")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a caption, for a model of captions; repeatable",
    )
    count = "images; default: as in the trial's own grids, or for arrays as in its evaluation"
    parser.add_argument("--num", type=int, metavar="N", help=count)
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise; default: the evaluation's")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance; 1 is none")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the sampler")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a GPU, or one")
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
    ending = options.output.suffix.lower()
    if ending not in _ENDINGS:
        raise ValueError(f"--output is {options.output}: its name must end in {' or '.join(_ENDINGS)}")
    from dtr_ray.evaluation.blocks import BLOCK_IMAGES
    from dtr_ray.evaluation.sample_file import SampleParts
    from dtr_ray.evaluation.workers import check_workers, default_workers, run_group
    from dtr_ray.export.trained import find_model, read_config

    most = default_workers()
    check_workers(most if options.workers is None else options.workers)
    folder = find_model(model_folder(options))
    config = read_config(folder)
    usual = config.evaluation.num_samples if ending == ".npz" else config.evaluation.grid_images
    count = options.num or usual
    num_workers = options.workers or min(most, -(-count // BLOCK_IMAGES))
    with SampleParts.beside(options.output) as parts:
        run_group(_draw, (folder, options, count, parts), num_workers)
        if ending == ".npz":
            parts.join(options.output, _labels_of(options, count, config.data.classes))
        else:
            _write_grid(options, count, config.data.classes, parts)
    print(f"{options.output}: {count} samples of {folder}")
    return 0


def _draw(
    group: "Group",
    device: "torch.device",
    folder: Path,
    options: argparse.Namespace,
    count: int,
    parts: "SampleParts",
) -> None:
    """As one worker of a group: this worker's blocks, the same as evaluation's."""
    import torch

    from dtr_ray.evaluation.blocks import Blocks
    from dtr_ray.export.trained import build_pipeline, open_model

    trained = open_model(folder, device)
    pipeline = build_pipeline(trained, options.prompt)
    for indices in Blocks(count, group).mine():
        numbers = indices.tolist()
        images = pipeline(
            options.labels and [options.labels[i % len(options.labels)] for i in numbers],
            len(numbers),
            prompt=options.prompt and [options.prompt[i % len(options.prompt)] for i in numbers],
            seed=options.seed,
            first_index=numbers[0],
            guidance_scale=options.guidance,
            num_inference_steps=options.steps,
            output_type="pt",
        ).images
        parts.write(indices, (images * 255).round().to(torch.uint8))


def _labels_of(options: argparse.Namespace, count: int, num_classes: int) -> "Tensor":
    """The samples' labels, int64 (N,): those asked for in turn; captions have none."""
    import torch

    from dtr_ray.evaluation.evaluate import sample_labels

    indices = torch.arange(count)
    if options.labels is None:
        return sample_labels(indices, num_classes)
    return torch.tensor(options.labels)[indices % len(options.labels)]


def _write_grid(options: argparse.Namespace, count: int, num_classes: int, parts: "SampleParts") -> None:
    import torch

    from dtr_ray.evaluation.evaluate import grid_columns, save_grid

    asked = options.labels or options.prompt
    columns = min(count, grid_columns(count, len(asked) if asked else num_classes))
    save_grid(torch.cat(list(parts.read())), options.output, columns)


if __name__ == "__main__":
    sys.exit(main())
