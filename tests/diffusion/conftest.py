"""The golden cases' model, with its synthetic weights."""

from collections.abc import Callable
from typing import Any

import pytest
from golden import fill_weights

from dtr_ray.models.dit import DiT
from dtr_ray.models.routing import dtr_mask


@pytest.fixture
def golden_dit() -> Callable[[dict[str, Any]], DiT]:
    """The DTR model of a golden file's settings (8 x 8 latents, patch 2, learned variance)."""

    def build(settings: dict[str, Any]) -> DiT:
        mask = dtr_mask(1000, settings["hidden"], 4, settings["beta"])
        model = DiT(
            8, 2, 4, settings["hidden"], settings["depth"], settings["heads"], settings["classes"], True, mask
        )
        weights = fill_weights(model.state_dict(), settings["seed"], settings["weight_scale"])
        model.load_state_dict(weights)
        return model.eval()

    return build
