"""The training loop and its state: plain PyTorch, on one process or many."""

from dtr_ray.training.loop import Observer, train
from dtr_ray.training.reports import Report
from dtr_ray.training.state import TrainingDivergedError, TrainingState, latest_checkpoint

__all__ = ["Observer", "Report", "TrainingDivergedError", "TrainingState", "latest_checkpoint", "train"]
