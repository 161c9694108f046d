"""Pictures of a sweep: the routing mask of a trial, and samples of the best and the worst trial."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dtr_ray.disk import write_durably

if TYPE_CHECKING:
    from dtr_ray.search.state import SweepState

_ON, _OFF = (31, 95, 173), (232, 236, 241)
_MARGIN, _LINE = 6, 14
_MIN_SIDE, _MAX_SIDE = 320, 1600


def draw_mask(mask: NDArray[np.bool_]) -> Image.Image:
    """A routing mask (T, C): a row a timestep, from 0 at the top, a column a channel; blue is on."""
    num_timesteps, num_channels = mask.shape
    colours = np.where(mask[..., None], np.array(_ON, np.uint8), np.array(_OFF, np.uint8))
    height, width = (min(max(side, _MIN_SIDE), _MAX_SIDE) for side in mask.shape)
    body = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * (_MARGIN + _LINE)), "white")
    canvas.paste(body, (_MARGIN, _MARGIN + _LINE))
    share = f"{mask.mean():.0%} on"
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), f"timestep 0, channels 0 to {num_channels - 1}; {share}", fill="black")
    draw.text((_MARGIN, _MARGIN + _LINE + height + 2), f"timestep {num_timesteps - 1}", fill="black")
    return canvas


def write_montage(state: "SweepState") -> Path | None:
    """Writes `montage.png`: samples of the best and the worst trial, at the same noise."""
    ranked = state.ranked()
    if len(ranked) < 2:
        return None
    tiles = []
    for which, (record, step, value) in (("best", ranked[0]), ("worst", ranked[-1])):
        picture = state.trial_folder(record.trial_id) / "grids" / f"{step:08d}.png"
        if not picture.exists():
            return None
        caption = f"{which}: {record.trial_id}, step {step}, {state.metric} {value:.4g}"
        tiles.append((caption, Image.open(picture).convert("RGB")))
    width = max(tile.width for _, tile in tiles)
    canvas = Image.new("RGB", (width, sum(tile.height + _LINE + 4 for _, tile in tiles)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for caption, tile in tiles:
        draw.text((4, top + 3), caption, fill="black")
        canvas.paste(tile, (0, top + _LINE + 4))
        top += tile.height + _LINE + 4
    path = state.folder / "montage.png"
    content = io.BytesIO()
    canvas.save(content, "PNG")
    write_durably(path, content.getvalue())
    return path
