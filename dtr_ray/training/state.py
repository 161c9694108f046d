"""TrainingState: all that changes while a model trains, and its checkpoints.

A checkpoint is a folder: `model.safetensors` and `ema.safetensors` (weights), `training.pt` (optimizer,
balancer and counters; read with `weights_only=True`), `trial.json` (the resolved configuration), and
`manifest.json` (SHA-256 of the others). No random state is stored, since every draw is keyed by (seed,
stream, step).
"""

import copy
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtr_ray.config import TrialConfig
from dtr_ray.diffusion.balancers import Balancer, build_balancer
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.disk import make_folder_durably, sync, with_room
from dtr_ray.models import build_model, set_step
from dtr_ray.training.checksums import MANIFEST_FILE, find_damage, write_checksums

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
TRAINING_FILE = "training.pt"
CONFIG_FILE = "trial.json"

_FILES = (MODEL_FILE, EMA_FILE, TRAINING_FILE, CONFIG_FILE, MANIFEST_FILE)

_log = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss, the weights or the samples are no longer finite numbers; the trial has failed."""


@dataclass
class TrainingState:
    """Model, its moving average, optimizer, balancer, and how far training has come."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    balancer: Balancer | None
    device: torch.device
    step: int = 0
    """Training steps done."""
    pending: list[Tensor] = field(default_factory=list)
    """This worker's losses of the last steps, still on the device: to read them is to wait for it."""
    losses: list[float] = field(default_factory=list)
    """Losses of the whole batches since the last record, `pending` apart."""
    train_seconds: float = 0.0
    saved_step: int | None = None
    """Step of the newest checkpoint that this process has written, or read whole."""
    saved_before: int | None = None
    """Step of the one before that."""

    @classmethod
    def build(cls, config: TrialConfig, device: torch.device) -> Self:
        """A fresh state; the weights are drawn from the training seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            model = build_model(config.resolved_model, config.routing, config.diffusion.num_timesteps)
        model = model.to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)
        balancer = build_balancer(config.weighting, schedule)
        groups = [{"params": list(model.parameters()), "weight_decay": config.training.weight_decay}]
        if balancer is not None:
            balancer = balancer.to(device)
            if learnt := list(balancer.parameters()):
                lr = getattr(config.weighting, "lr", config.training.lr)
                groups.append({"params": learnt, "weight_decay": 0.0, "lr": lr})
        # Fused AdamW is 2.6 times quicker than the default on a CPU, and quicker still on a GPU.
        optimizer = torch.optim.AdamW(groups, lr=config.training.lr, fused=True)
        return cls(model, ema, optimizer, balancer, device)

    def learn_no_caption(self, tokens: Tensor) -> None:
        """Keeps the empty caption's tokens (L, D) in model and average, where they drop captions at all."""
        for model in (self.model, self.ema):
            null_tokens = getattr(model, "null_tokens", None)
            if null_tokens is not None:
                null_tokens.copy_(tokens)

    def route(self) -> None:
        """Gives model and average the masks of this step, for routings that change in training."""
        set_step(self.model, self.step)
        set_step(self.ema, self.step)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Moves the average towards the model: ema = decay * ema + (1 - decay) * model."""
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1.0 - decay)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights are finite numbers, the average's included; waits for the device."""
        weights = [*self.model.parameters(), *self.ema.parameters()]
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())

    def save(self, folder: Path, config: TrialConfig) -> None:
        """Writes a checkpoint that is either whole or absent, even when the power fails in between.

        Waits while the disk is full, and leaves nothing there meanwhile.
        """
        make_folder_durably(folder.parent)
        with_room(folder.parent, lambda: self._save(folder, config), self.num_bytes)
        self.saved_before, self.saved_step = self.saved_step, self.step

    @property
    def num_bytes(self) -> int:
        """Size of a checkpoint, but for a few KB."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        modules = [self.model, self.ema, *([] if self.balancer is None else [self.balancer])]
        weights = (value for module in modules for value in module.state_dict().values())
        return sum(v.numel() * v.element_size() for v in (*weights, *moments) if isinstance(v, Tensor))

    def _save(self, folder: Path, config: TrialConfig) -> None:
        temporary = _hidden(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self._write(temporary, config)
            # There is one only where it was found damaged: training goes on from before it.
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(folder.parent)

    def _write(self, temporary: Path, config: TrialConfig) -> None:
        temporary.mkdir(parents=True)
        save_file(_contiguous(self.model), temporary / MODEL_FILE)
        save_file(_contiguous(self.ema), temporary / EMA_FILE)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "train_seconds": self.train_seconds,
        }
        # By Python's own file: PyTorch's says nothing of a disk that is full.
        with (temporary / TRAINING_FILE).open("wb") as file:
            torch.save(training, file)
        config.save(temporary / CONFIG_FILE)
        write_checksums(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)

    def load(self, folder: Path, config: TrialConfig) -> None:
        """Takes over what `save` wrote; learning rates and weight decay stay those of `config`.

        Raises:
            ValueError: the checkpoint is damaged, or is one of another model or balancer.
        """
        damage = _damage(folder)
        if damage is not None:
            raise ValueError(f"the checkpoint {folder} is missing or damaged: {damage}")
        _check_same_model(folder, config)
        device = str(self.device)
        self.model.load_state_dict(load_file(folder / MODEL_FILE, device=device))
        self.ema.load_state_dict(load_file(folder / EMA_FILE, device=device))
        training = torch.load(folder / TRAINING_FILE, map_location=self.device, weights_only=True)
        settings = [{key: g[key] for key in ("lr", "weight_decay")} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(training["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if self.balancer is not None:
            self.balancer.load_state_dict(training["balancer"])
        self.losses = training["losses"]
        self.step = training["step"]
        self.train_seconds = training["train_seconds"]
        self.saved_step = self.step
        self.route()


def checkpoint_folder(trial_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return trial_folder / "checkpoints" / f"{step:08d}"


def latest_checkpoint(trial_folder: Path) -> Path | None:
    """The newest whole checkpoint of a trial, or None; damaged ones are passed over with a warning."""
    found = _checkpoints(trial_folder)
    for folder in reversed(found):
        damage = _damage(folder)
        if damage is None:
            return folder
        _log.warning("the checkpoint %s is damaged (%s): going back to the one before it", folder, damage)
    if found:
        _log.warning("no checkpoint of %s is whole: it is trained again from its first step", trial_folder)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    if not checkpoint.is_dir():
        return "No such file or directory"
    missing = [name for name in _FILES if not (checkpoint / name).is_file()]
    return f"{missing[0]} is missing" if missing else find_damage(checkpoint)


def prune_checkpoints(trial_folder: Path, keep: set[int]) -> None:
    """Removes all checkpoints but those of the steps in `keep`, and what a crash left half written."""
    for leftover in (trial_folder / "checkpoints").glob(".*.part"):
        shutil.rmtree(leftover)
    for folder in _checkpoints(trial_folder):
        if int(folder.name) not in keep:
            # First out of sight: a crash must not leave half a checkpoint.
            shutil.rmtree(folder.rename(_hidden(folder)))


def _checkpoints(trial_folder: Path) -> list[Path]:
    """Oldest first."""
    found = (trial_folder / "checkpoints").glob("[0-9]*")
    return sorted(found, key=lambda folder: int(folder.name))


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _check_same_model(checkpoint: Path, config: TrialConfig) -> None:
    theirs = TrialConfig.load(checkpoint / CONFIG_FILE)
    pairs = {
        "model": (theirs.resolved_model, config.resolved_model),
        "routing": (theirs.routing, config.routing),
        "diffusion": (theirs.diffusion, config.diffusion),
        "weighting": (theirs.weighting, config.weighting),
    }
    for section, (before, now) in pairs.items():
        if before != now:
            raise ValueError(
                f"the checkpoint {checkpoint} was trained with {section} {before}, and this trial has {now}"
            )


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in module.state_dict().items()}
