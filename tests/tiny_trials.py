"""Trials that train in milliseconds on real digits, and what runs them in processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtr_ray.cache import cache_dir
from dtr_ray.config import TrialConfig
from dtr_ray.config.base import override
from dtr_ray.data import ImageData, load_images
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.models import load_weights
from dtr_ray.training import Observer, Report, TrainingState, latest_checkpoint, train
from dtr_ray.training.batches import Batches
from dtr_ray.training.state import EMA_FILE

WEIGHTINGS = ["vanilla", "min_snr", "p2", "ant_uw", "ant_pcgrad", "ant_nash"]
BALANCERS = ["ant_uw", "ant_pcgrad", "ant_nash"]
SWITCH_DIT: dict[str, Any] = {
    "model__name": "Switch-DiT",
    "model__hidden_size": 32,
    "model__depth": 1,
    "model__num_heads": 2,
    "model__patch_size": 4,
    "routing__name": "none",
}
METRIC = "fd_efficientnet_lite0_16"
TINY: dict[str, Any] = {
    "data": {"name": "digits", "resolution": 8},
    "model": {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
    "training": {"num_steps": 6, "batch_size": 12, "lr": 3e-3, "ema_decay": 0.5, "log_every_steps": 2},
    "sampling": {"sampler": "ddim", "num_steps": 2, "clip_denoised": True},
    "evaluation": {"every_steps": 6, "num_samples": 16, "features": "efficientnet_lite0"},
}


def tiny_config(**changes: Any) -> TrialConfig:
    """TINY with changes: `tiny_config(training__lr=1.0)`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return TrialConfig.from_dict(override(TINY, dotted))


def digits(config: TrialConfig | None = None) -> ImageData:
    return load_images((config or tiny_config()).data, cache_dir())


def batches_of(
    config: TrialConfig, state: TrainingState | None = None, rank: int = 0, world_size: int = 1
) -> Batches:
    """The batches of a trial, made as the loop makes them; on the device of `state`."""
    state = state or TrainingState.build(config, torch.device("cpu"))
    return Batches(
        config,
        digits(config),
        Group(rank, world_size),
        state.device,
        null_label=getattr(state.model, "null_label", None),
        intervals=None if state.balancer is None else state.balancer.intervals,
    )


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Recorder(Observer):
    """Keeps all that the loop tells; speeds and seconds apart, which are never the same twice."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.steps: list[int] = []
        self.evaluated_steps: list[int] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        assert values["train_images_per_s"] > 0
        self.losses[step] = values["train_loss"]

    def progress(self, step: int, phase: str) -> None:
        if phase == "training":
            self.steps.append(step)

    def evaluated(self, report: Report) -> None:
        self.evaluated_steps.append(report.step)


class KilledError(Exception):
    """Stands for the end of the process."""


class KillAt(Recorder):
    """Ends the run right after a step, before that step's checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def progress(self, step: int, phase: str) -> None:
        super().progress(step, phase)
        if step == self._step and phase == "training":
            raise KilledError


def final_state(config: TrialConfig, folder: Path) -> TrainingState:
    """What the trial's newest checkpoint holds."""
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    state = TrainingState.build(config, torch.device("cpu"))
    state.load(checkpoint, config)
    return state


def tensors_of(state: TrainingState) -> dict[str, Tensor]:
    """All tensors of a state by name: weights, EMA, optimizer's moments, the balancer's scales."""
    named = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    named |= {f"ema.{k}": v for k, v in state.ema.state_dict().items()}
    if state.balancer is not None:
        named |= {f"balancer.{k}": v for k, v in state.balancer.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{number}.{k}": v for k, v in moments.items()}
    return named


def distances(reports: list[Report], metric: str = METRIC) -> dict[int, float]:
    return {report.step: report.metrics[metric] for report in reports}


def process_context() -> ForkServerContext:
    """Processes forked off a clean one that has no threads and has imported all there is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_trials"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13 the server does not hear of sys.path, and passes over what it cannot import.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return context


def save_for_ever(folder: str) -> None:
    """Saves checkpoints of steps 1, 2, 3, ... until it is killed."""
    torch.set_num_threads(1)
    config = tiny_config()
    state = TrainingState.build(config, torch.device("cpu"))
    while True:
        state.step += 1
        state.save(Path(folder, "checkpoints", f"{state.step:08d}"), config)


def in_group(
    rank: int, world_size: int, folder: str, work: Callable[[Group, Path], Any], environment: dict[str, str]
) -> None:
    """Runs `work(group, folder)` as one worker of a gloo group; its result, or error, goes to a file."""
    import torch.distributed as dist

    os.environ |= environment
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result = work(Group.current(), Path(folder))
    except Exception as error:  # the test looks at it
        result = error
    torch.save(result, f"{folder}/result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_workers(work: Callable[[Group, Path], Any], world_size: int, folder: Path) -> list[Any]:
    """Results (or exceptions) of `work` on each worker of a gloo group; `work` is of this module."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: os.environ[key] for key in ("DTR_RAY_CACHE", "OMP_NUM_THREADS")}
    processes = [
        process_context().Process(target=in_group, args=(rank, world_size, str(folder), work, environment))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def train_each_weighting(group: Group, folder: Path) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """Trains with every weighting; the losses and distances of each."""
    found = {}
    for name in WEIGHTINGS:
        config = tiny_config(weighting__name=name, training__log_every_steps=1)
        observer = Recorder()
        reports = list(train(config, folder / name, digits(config), group=group, observer=observer))
        found[name] = (observer.losses, distances(reports))
    return found


def train_in_parts(group: Group, folder: Path) -> dict[str, tuple[list[float], Tensor]]:
    """Steps of a Switch-DiT, whose forward gives an extra loss, in three parts each; losses and weights."""
    from dtr_ray.training.loop import check_losses
    from dtr_ray.training.step import build_step

    found = {}
    for name in ["vanilla", *BALANCERS]:
        changes: dict[str, Any] = {"weighting__num_clusters": 2} if name in BALANCERS else {}
        if name == "ant_nash":
            changes["weighting__every_steps"] = 2
        config = tiny_config(**SWITCH_DIT, **changes, weighting__name=name, training__accumulation_steps=3)
        state = TrainingState.build(config, torch.device("cpu"))
        state.model.train()
        batches = batches_of(config, state, group.rank, group.world_size)
        step = build_step(config, state, group)
        for number in range(5):
            step(batches.at(number))
            state.step += 1
        check_losses(state, group)
        weights = torch.cat([weight.detach().flatten() for weight in state.model.parameters()])
        found[name] = (state.losses, weights)
    return found


class PlantedNaN(ImageData):
    """Digits of which one is not a number."""

    def __init__(self, data: ImageData, index: int) -> None:
        self.__dict__.update(vars(data))
        self.index = index

    def batch(
        self, indices: Tensor, flip: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        x = super().batch(indices, flip, generator)
        x[indices == self.index] = torch.nan
        return x


def train_with_nan_on_the_last_worker(group: Group, folder: Path) -> None:
    """One image of the last worker's share of the third batch is not a number."""
    from dtr_ray.data.order import batch_indices

    config = tiny_config()
    data = digits(config)
    index = int(batch_indices(len(data), 12, 2, config.training.seed)[-1])
    list(train(config, folder / "trial", PlantedNaN(data, index), group=group))


def communicate(group: Group, folder: Path) -> dict[str, Any]:
    """One call of each of the group's methods."""
    device = torch.device("cpu")
    rows = torch.arange(group.rank, 7, group.world_size)
    return {
        "slice": group.slice(torch.arange(12)),
        "mean": group.mean_(torch.tensor([1.0 + group.rank])),
        "any_last": group.any(group.rank == group.world_size - 1, device),
        "any_none": group.any(False, device),
        "gathered": group.gather_interleaved(rows[:, None] * torch.ones(1, 2), 7),
        "pictures": group.gather_interleaved(torch.full((int(group.is_main), 3), 9, dtype=torch.uint8), 1),
        "from_main": group.from_main({"rank": group.rank}),
        "is_main": group.is_main,
    }


def stop_and_resume(group: Group, folder: Path) -> tuple[dict[int, float], dict[int, float]]:
    """A run that is left after its first report, between two records, and gone on with: losses, distances."""
    config = tiny_config(weighting__name="ant_uw", evaluation__every_steps=3)
    data, observer = digits(config), Recorder()
    run = train(config, folder / "resumed", data, group=group, observer=observer)
    next(run)
    run.close()
    reports = list(train(config, folder / "resumed", data, group=group, observer=observer))
    return observer.losses, distances(reports)


def measure_all(group: Group, folder: Path) -> dict[str, float]:
    """All metrics of an untrained model."""
    extras = ["kid", "inception_score", "precision_recall"]
    config = tiny_config(evaluation__num_samples=40, evaluation__extra_metrics=extras)
    torch.manual_seed(0)
    model = TrainingState.build(config, torch.device("cpu")).model.eval()
    found = Evaluator(config, digits(config), group, torch.device("cpu")).evaluate(model).metrics
    return {name: value for name, value in found.items() if name != "eval_seconds"}


def train_with_roaming_masks(group: Group, folder: Path) -> tuple[dict[int, float], Tensor]:
    """Trains with masks that change at each step; the losses, and the average's mask in the end."""
    config = tiny_config(routing__name="max_roaming", routing__every_steps=1, training__log_every_steps=1)
    observer = Recorder()
    list(train(config, folder / "trial", digits(config), group=group, observer=observer))
    return observer.losses, final_state(config, folder / "trial").ema.get_buffer("masks.mask")


EVALUATED = {"num_samples": 120, "extra_metrics": ["inception_score"]}
BATCH_SIZES = (7, 50, 250)


def evaluate_in_batches(group: Group, folder: Path) -> dict[str, tuple[dict[int, Tensor], dict[str, float]]]:
    """The trial's checkpoint, evaluated with three batch sizes in both precisions.

    For each the images of this worker's samples, by their number, and all figures.
    """
    newest = latest_checkpoint(folder.parent / "trial")
    assert newest is not None
    found = {}
    for precision in ("fp32", "bf16"):
        for batch_size in BATCH_SIZES:
            changes = {f"evaluation__{key}": value for key, value in EVALUATED.items()}
            config = tiny_config(**changes, training__precision=precision, evaluation__batch_size=batch_size)
            state = TrainingState.build(config, torch.device("cpu"))
            load_weights(state.ema, newest / EMA_FILE)
            images: dict[int, Tensor] = {}
            evaluation = Evaluator(config, digits(config), group, torch.device("cpu")).evaluate(
                state.ema.eval(),
                on_images=lambda numbers, block, kept=images: kept.update(
                    zip(numbers.tolist(), block, strict=True)
                ),
            )
            metrics = {name: v for name, v in evaluation.metrics.items() if name != "eval_seconds"}
            found[f"{precision}, {batch_size} at once"] = images, metrics
    return found
