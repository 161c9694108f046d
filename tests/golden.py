"""Golden data: numbers from the authors' public code, and the recipes that rebuild its inputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "golden"


def load(stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and settings of a golden file."""
    with np.load(FOLDER / f"{stem}.npz", allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return tensors, json.loads((FOLDER / f"{stem}.json").read_text(encoding="utf-8"))


def fill_weights(state_dict: Mapping[str, Tensor], seed: int, scale: float) -> dict[str, Tensor]:
    """Synthetic weights: one generator over the sorted keys; fixed tables and masks are left out."""
    generator = np.random.default_rng(seed)
    return {
        key: torch.from_numpy((generator.standard_normal(value.shape) * scale).astype(np.float32))
        for key, value in sorted(state_dict.items())
        if key not in ("pos_embed", "full_time") and not key.endswith("_unit_mapping")
    }


def latents(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Latent-like standard normal inputs, float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
