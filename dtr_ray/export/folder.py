"""export_model: a checkpoint as a folder that diffusers loads, with what tells where it comes from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtr_ray.config import Config, TrialConfig
from dtr_ray.config.base import flatten
from dtr_ray.evaluation.evaluate import grid_columns, save_grid
from dtr_ray.export.trained import TrainedModel, build_pipeline, open_model
from dtr_ray.training.checksums import write_checksums
from dtr_ray.training.state import CONFIG_FILE

GRID_FILE = "samples.png"
FIGURES_FILE = "figures.json"
_CARD_FILE = "README.md"

_README = """\
---
library_name: diffusers
pipeline_tag: {task}
---
# {name}

A diffusion model ({model}), trained in batches of {batch_size} on {data}.

- {facts}

![samples]({grid})

Load it where the package `dtr_ray` is installed:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH OF THIS FOLDER", trust_remote_code=True)
images = pipeline({call}).images
```

`trust_remote_code=True` lets diffusers run `pipeline.py`, which imports the pipeline from `dtr_ray`:
diffusers has no model with routing of its own, and runs no other code without being told. Without it:
`from dtr_ray.export.pipeline import DTRPipeline`, then `DTRPipeline.from_pretrained(...)`.

`transformer/` holds the averaged (EMA) weights under the key names of the official DiT checkpoints,
`trial.json` the whole training configuration.
"""


def export_model(
    checkpoint: Path,
    folder: Path,
    *,
    name: str = "DTR",
    facts: Mapping[str, str | float] | None = None,
    grid: Path | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a diffusers pipeline with the averaged weights, the configuration, a model card and a grid.

    Args:
        checkpoint: whatever `open_model` takes.
        folder: the export's; it appears whole, and replaces an export that was there.
        name: the model's, for its card.
        facts: what else the card tells: metrics, where the model comes from.
        grid: a picture of samples to put beside; default: drawn with the exported pipeline.
        figures: what was measured and how (metrics, protocol), written to `figures.json`.

    Returns:
        `folder`.

    Raises:
        ValueError: there is no such model, or `folder` holds something else.
    """
    if folder.exists() and not (folder / CONFIG_FILE).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something that is not an exported model: give another folder")
    trained = open_model(checkpoint)
    pipeline = build_pipeline(trained)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    trained.config.save(temporary / CONFIG_FILE)
    if grid is not None:
        shutil.copyfile(grid, temporary / GRID_FILE)
    else:
        count = min(trained.config.evaluation.grid_images, trained.config.evaluation.num_samples)
        images = (pipeline(num_images=count, output_type="pt").images * 255).round().to(torch.uint8)
        save_grid(images, temporary / GRID_FILE, grid_columns(count, trained.config.data.classes))
    if figures is not None:
        (temporary / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    card = _model_card(trained, name, facts or {}, pipeline.config.prompts)
    (temporary / _CARD_FILE).write_text(card, encoding="utf-8")
    # What people may well write in or exchange is left out.
    write_checksums(temporary, but=(_CARD_FILE, GRID_FILE, FIGURES_FILE))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def _model_card(
    trained: TrainedModel, name: str, facts: Mapping[str, str | float], prompts: Sequence[str]
) -> str:
    config = trained.config
    call = "class_labels=[0, 1, 2]" if config.data.classes > 2 else "num_images=4"
    if prompts:
        call = f"prompt={json.dumps(prompts[:2], ensure_ascii=False)}"
    lines = {"routing": _in_words(config.routing), "weighting": _in_words(config.weighting), **facts}
    return _README.format(
        task="text-to-image" if config.data.text_encoder else "unconditional-image-generation",
        name=name,
        model=config.model.name,
        batch_size=config.training.batch_size,
        data=_data_in_words(config),
        facts="\n- ".join(f"{key}: {_short(value)}" for key, value in lines.items()),
        grid=GRID_FILE,
        call=call,
    )


def _short(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_words(section: Config) -> str:
    values = flatten(section.to_dict())
    name = str(values.pop("name"))
    parts = [f"{key.removesuffix('.name')} {_short(value)}" for key, value in values.items()]
    return f"{name} ({', '.join(parts)})" if parts else name


def _data_in_words(config: TrialConfig) -> str:
    data = config.data
    kind = f"{data.classes} classes" if data.classes > 1 else "no classes"
    if data.text_encoder is not None:
        kind = f"captions by {Path(data.text_encoder).name}"
    what = Path(data.path).name if data.path else data.name
    latents = ", as latents of a VAE" if data.vae else ""
    return f"{what} ({data.resolution} x {data.resolution} pixels, {kind}{latents})"
