"""Golden cases of the authors' code: inputs, weights by recipe, expected results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any] | list[Any], dict[str, np.ndarray]]]:
    """A golden file's JSON and arrays, by stem."""

    def load(stem: str) -> tuple[dict[str, Any] | list[Any], dict[str, np.ndarray]]:
        with np.load(GOLDEN / f"{stem}.npz", allow_pickle=False) as arrays:
            return json.loads((GOLDEN / f"{stem}.json").read_text()), dict(arrays)

    return load


@pytest.fixture(scope="session")
def golden_weights() -> Callable[[dict[str, Any], int], dict[str, Tensor]]:
    """The official checkpoint of a golden case, without `pos_embed`; routing buffers hold zeros."""

    def fill(case: dict[str, Any], seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        weights = {}
        for entry in sorted(case["state_dict"], key=lambda entry: entry["key"]):
            if entry["filled"]:
                values = generator.standard_normal(entry["shape"]) * case["weight_scale"]
                weight = torch.from_numpy(values.astype(np.float32))
                assert weight.double().sum().item() == pytest.approx(entry["sum_f64"], rel=1e-9)
                weights[entry["key"]] = weight
            elif entry["key"] != "pos_embed":
                weights[entry["key"]] = torch.zeros(entry["shape"])
        return weights

    return fill
