"""The affinity of timesteps: how far the gradients of their losses agree, measured on a trained model.

Go et al., "Addressing Negative Transfer in Diffusion Models" (ANT), section 3: the mean, over batches, of the
cosine similarity between the gradients of the loss at two timesteps. n measured timesteps, T of the model,
D length of a gradient's sketch, B images of a batch.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dtr_ray.analysis.sketch import Sketch
from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.data import load_images
from dtr_ray.diffusion.affinity import Affinity, load_affinity
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import NoiseSchedule, noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.export.trained import find_model, open_model, read_config
from dtr_ray.training.batches import Batch, Batches

# Timesteps of one part: enough work for what it costs to hand a part out, and few enough to share evenly.
_PART_TIMESTEPS = 10


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    num_measured: int = 100
    """n, evenly spread over [0, T), both ends included; at least 2."""
    num_batches: int = 4
    batch_size: int = 32
    """B: a gradient is that of the mean loss of so many images, all at one timestep."""
    seed: int = 0
    """Of images, noise and sketches."""
    sketch_size: int = 2**15
    """D: gradients of more numbers are sketched, each batch anew, so that the errors average out."""

    def __post_init__(self) -> None:
        for name, least in (("num_batches", 1), ("batch_size", 1), ("seed", 0), ("sketch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def timesteps(self, num_timesteps: int) -> list[int]:
        """The measured ones of T; raises ValueError where n is not in [2, T]."""
        if not 2 <= self.num_measured <= num_timesteps:
            raise ValueError(
                f"{self.num_measured} timesteps are to be measured: it must be from 2 to all {num_timesteps}"
            )
        places = np.linspace(0, num_timesteps - 1, self.num_measured)
        return [int(t) for t in np.rint(places)]


@dataclass(frozen=True)
class Part:
    """What one worker measures at a time: the gradients of some timesteps on one batch."""

    model: str
    """Folder of the model, absolute."""
    settings: Settings
    batch: int
    """Number of the batch, from 0."""
    first: int
    """Place of the first timestep among the measured ones."""
    timesteps: tuple[int, ...]


Sketches = NDArray[np.float32]
RunParts = Callable[[Callable[[Part, str], Sketches], Sequence[Part]], Iterable[tuple[int, Sketches]]]
"""Calls a function on all parts, with the device to use, and yields (number of the part, result) as they
come, in any order."""


def run_in_process(
    work: Callable[[Part, str], Sketches], parts: Sequence[Part]
) -> Iterator[tuple[int, Sketches]]:
    """Runs all parts in this process, one after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, part in enumerate(parts):
        yield number, work(part, device)


def measure_affinity(
    checkpoint: Path,
    settings: Settings,
    run_parts: RunParts = run_in_process,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Affinity:
    """Measures the affinity of a trained model's timesteps, on the images that it was trained on.

    Every timestep sees the same images and the same noise. The gradients are those of the averaged weights,
    of the unweighted training loss (its factor at a timestep would change no angle of the noise's part), in
    float32, with the model in evaluation mode and no label (or caption) dropped. The result does not depend
    on who measures which part, but for rounding.

    Args:
        checkpoint: any folder that `find_model` knows.
        settings: what to measure.
        run_parts: who measures the parts; here, or Ray's workers.
        on_progress: told the parts done and those there are, after each.

    Raises:
        ValueError: there is no model, or n is out of range.
        FloatingPointError: a gradient is zero or not finite.
    """
    folder = find_model(checkpoint)
    num_timesteps = read_config(folder).diffusion.num_timesteps
    timesteps = settings.timesteps(num_timesteps)
    parts = [
        Part(str(folder.resolve()), settings, batch, first, tuple(timesteps[first : first + _PART_TIMESTEPS]))
        for batch in range(settings.num_batches)
        for first in range(0, len(timesteps), _PART_TIMESTEPS)
    ]
    matrices: dict[int, NDArray[np.float64]] = {}
    waiting: dict[int, dict[int, Sketches]] = {batch: {} for batch in range(settings.num_batches)}
    per_batch = len(parts) // settings.num_batches
    # The folder may hold another model than the last time.
    _subject.cache_clear()
    for done, (number, sketches) in enumerate(run_parts(part_gradients, parts), 1):
        part = parts[number]
        found = waiting[part.batch]
        found[part.first] = sketches
        if len(found) == per_batch:
            # Given up at once: a batch's sketches of all timesteps take 4 n D bytes.
            matrices[part.batch] = cosines(np.concatenate([found[first] for first in sorted(found)]))
            del waiting[part.batch]
        on_progress(done, len(parts))
    assert not waiting, f"batches that are not whole: {sorted(waiting)}"
    # In the order of the batches, whoever was the first to be ready.
    matrix = np.mean([matrices[batch] for batch in sorted(matrices)], axis=0)
    return Affinity(matrix, np.array(timesteps, np.int64), num_timesteps, source_of(folder, settings))


def cosines(vectors: Sketches) -> NDArray[np.float64]:
    """Cosine similarity of rows (n, D), none of them 0: float64 (n, n), symmetric, with a diagonal of 1."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found: NDArray[np.float64] = (unit @ unit.T).astype(np.float64).clip(-1, 1)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 1)
    return found


def part_gradients(part: Part, device: str) -> Sketches:
    """The sketches (timesteps, D) of the loss's gradients at each timestep of a part.

    Raises:
        FloatingPointError: a gradient is zero or not finite.
    """
    subject = _subject(part.model, device)
    batch = subject.batch(part.settings, part.batch)
    num_values = sum(parameter.numel() for parameter in subject.parameters)
    sketch = _sketch(num_values, part.settings.sketch_size, part.settings.seed, part.batch, device)
    rows = np.stack([sketch(subject.gradient(batch, t)).cpu().numpy() for t in part.timesteps])
    for t, norm in zip(part.timesteps, np.linalg.norm(rows, axis=1), strict=True):
        if not (np.isfinite(norm) and norm > 0):
            raise FloatingPointError(f"the gradient at timestep {t} has the norm {norm}: it has no direction")
    return rows


class _Subject:
    """The model whose gradients are measured, with its images; kept by a process from part to part."""

    def __init__(self, folder: str, device: str) -> None:
        trained = open_model(Path(folder), device)
        self.config: TrialConfig = trained.config
        # Its averaged weights; in evaluation mode.
        self.model: nn.Module = trained.model.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        diffusion = self.config.diffusion
        self.device = torch.device(device)
        self.schedule: NoiseSchedule = noise_schedule(diffusion.schedule, diffusion.num_timesteps)
        self.data = load_images(self.config.data, cache_dir())

    def batch(self, settings: Settings, number: int) -> Batch:
        """Images, labels or captions, and noise of a batch; its own timesteps are not used."""
        changes = {"batch_size": settings.batch_size, "seed": settings.seed}
        training = self.config.training.model_copy(update=changes)
        model = self.config.model.model_copy(update={"class_dropout_prob": 0.0})
        config = self.config.model_copy(update={"training": training, "model": model})
        batches = Batches(config, self.data, Group(), self.device, null_label=None, intervals=None)
        return batches.at(number)

    def gradient(self, batch: Batch, timestep: int) -> list[torch.Tensor]:
        """Of the mean loss at one timestep, by parameter."""
        t = torch.full_like(batch.t, timestep)
        losses = diffusion_losses(self.model, self.schedule, batch.x, t, batch.noise, {"y": batch.conditions})
        gradients = torch.autograd.grad(losses["loss"].mean(), self.parameters, allow_unused=True)
        pairs = zip(gradients, self.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]


@functools.lru_cache(maxsize=1)
def _subject(folder: str, device: str) -> _Subject:
    return _Subject(folder, device)


@functools.lru_cache(maxsize=1)
def _sketch(num_values: int, size: int, seed: int, batch: int, device: str) -> Sketch:
    return Sketch(num_values, size, seed, batch, device=device)


def source_of(folder: Path, settings: Settings) -> dict[str, Any]:
    """What tells one measurement from another: the weights, their configuration, and the settings."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("ema.safetensors"), *folder.glob("transformer/*.safetensors")]):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    config = read_config(folder).to_dict()
    measured = {name: config[name] for name in ("data", "model", "routing", "diffusion")}
    digest.update(json.dumps(measured, sort_keys=True).encode())
    return {"checkpoint": str(folder), "identity": digest.hexdigest(), "settings": asdict(settings)}


def find_measured(output: Path, checkpoint: Path, settings: Settings) -> Affinity | None:
    """What an earlier measurement of the same model with the same settings has left in `output`.

    Raises:
        ValueError: there is no model, or `output` is a file of another kind.
    """
    folder = find_model(checkpoint)
    if not output.exists():
        return None
    found = load_affinity(output)
    wanted = source_of(folder, settings)
    same = all(found.source.get(key) == wanted[key] for key in ("identity", "settings"))
    return found if same else None
