"""Pictures of what analysis has found."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dtr_ray.diffusion.affinity import Affinity
from dtr_ray.diffusion.clustering import Interval


def draw_affinity(affinity: Affinity, intervals: Sequence[Interval], path: Path) -> None:
    """Writes a heat map of the affinity (ANT, figure 1), with lines where the intervals meet, as a PNG."""
    # A figure of its own, since pyplot keeps state and chooses a window system.
    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(
        affinity.timesteps,
        affinity.timesteps,
        affinity.matrix,
        vmin=-1,
        vmax=1,
        cmap="RdBu_r",
        shading="nearest",
    )
    for start, _ in intervals[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=0.6, linestyle=":")
        axes.axhline(start - 0.5, color="black", linewidth=0.6, linestyle=":")
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xlabel("timestep")
    axes.set_ylabel("timestep")
    count, batches = len(affinity.timesteps), affinity.source["settings"]["num_batches"]
    axes.set_title(f"{count} timesteps, {batches} batches; dotted: {len(intervals)} intervals", fontsize=9)
    figure.colorbar(image, label="mean cosine similarity of gradients")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
