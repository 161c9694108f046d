"""Sweeps that share a study in a database."""

from typing import Any

from dtr_ray.config import SweepConfig

METRIC = "fd_efficientnet_lite0_1k"
SMALL = {
    "routing.alpha": {"type": "quniform", "low": 1, "high": 4, "step": 1},
    "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "p2"]},
}


def sweep(study: str, name: str = "one", study_name: str | None = "all", **changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "name": name,
        "trial": {
            "data": {"name": "digits", "resolution": 8},
            "model": {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
            "training": {"num_steps": 400},
            "sampling": {"sampler": "ddim", "num_steps": 5},
            "evaluation": {"every_steps": 100, "num_samples": 1000, "features": "efficientnet_lite0"},
        },
        "space": {**SMALL, "routing.beta": {"type": "uniform", "low": 0.5, "high": 1.0}},
        "search": {"num_trials": 6, "num_startup_trials": 3, "seed": 3},
        "storage": {"study": study, "study_name": study_name},
    }
    return SweepConfig.from_dict({**values, **changes})
