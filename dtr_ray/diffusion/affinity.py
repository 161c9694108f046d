"""Affinity files: how far the gradients of n measured timesteps agree, for the clustering of all T.

A `.npz` file with `affinity` (n, n) float64, `timesteps` (n,) int64 ascending in [0, T), `num_timesteps` (T),
and `source`, what was measured and how, as JSON.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Affinity:
    """Mean cosine similarity of the gradients of the loss at two timesteps (ANT, section 3)."""

    matrix: NDArray[np.float64]
    """(n, n), in [-1, 1]."""
    timesteps: NDArray[np.int64]
    """The measured ones, (n,), ascending, in [0, T)."""
    num_timesteps: int
    """T"""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and with which settings; plain values."""

    def save(self, path: Path) -> None:
        """Writes the file; whoever reads it meanwhile sees the old one or the new one, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    affinity=self.matrix,
                    timesteps=self.timesteps,
                    num_timesteps=np.int64(self.num_timesteps),
                    source=np.array(json.dumps(dict(self.source), sort_keys=True)),
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_affinity(path: Path) -> Affinity:
    """Reads an affinity file.

    Raises:
        ValueError: the file is missing, or is none; the message names it.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array")
        with arrays:
            found = {name: arrays[name] for name in arrays.files}
        source = json.loads(str(found.get("source", "{}")))
    except FileNotFoundError:
        raise ValueError(
            f"{str(path)!r} does not exist: python -m dtr_ray.analyze affinity CHECKPOINT measures one"
        ) from None
    # What NumPy raises for bytes that are no archive, and for a broken one.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is no affinity file: {error}") from error
    missing = [name for name in ("affinity", "timesteps", "num_timesteps") if name not in found]
    if missing:
        raise ValueError(f"{str(path)!r} is no affinity file: it has no array {', '.join(missing)}")
    wrong = _wrong(**{name: found[name] for name in ("affinity", "timesteps", "num_timesteps")})
    if wrong is not None:
        raise ValueError(f"{str(path)!r} is no affinity file: {wrong}")
    matrix, timesteps = found["affinity"].astype(np.float64), found["timesteps"].astype(np.int64)
    return Affinity(matrix, timesteps, int(found["num_timesteps"]), source)


def _wrong(affinity: NDArray[Any], timesteps: NDArray[Any], num_timesteps: NDArray[Any]) -> str | None:
    """What the arrays of an affinity file break, or None."""
    if affinity.dtype.kind != "f" or affinity.shape != (len(np.atleast_1d(timesteps)),) * 2:
        return f"affinity is {affinity.dtype} {affinity.shape}: it must be float (n, n), n the timesteps"
    if num_timesteps.dtype.kind not in "iu" or num_timesteps.shape != () or num_timesteps < 1:
        return f"num_timesteps is {num_timesteps}: it must be one whole number from 1 up"
    if timesteps.dtype.kind not in "iu" or timesteps.ndim != 1 or not timesteps.size:
        return f"timesteps is {timesteps.dtype} {timesteps.shape}: it must be whole numbers (n,)"
    if not np.isfinite(affinity).all():
        return "affinity has values that are not finite"
    if np.abs(affinity).max() > 1 + 1e-6:
        return f"affinity has the value {affinity.flat[np.abs(affinity).argmax()]:g}: all are in [-1, 1]"
    if (np.diff(timesteps.astype(np.int64)) < 1).any() or timesteps[0] < 0 or timesteps[-1] >= num_timesteps:
        return f"timesteps must ascend in [0, {num_timesteps})"
    return None
