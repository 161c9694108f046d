"""The training loop: a generator that yields a report at every evaluation, and trains on when it is resumed.

Every worker draws the random numbers of the whole batch from the same keyed generators and takes its own
slice, so a run does not depend on the number of workers, and a resumed run repeats the uninterrupted one.
"""

import json
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtr_ray.config import TrialConfig
from dtr_ray.data import ImageData
from dtr_ray.data.order import batch_indices
from dtr_ray.diffusion.intervals import stratified_timesteps
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import NoiseSchedule, noise_schedule
from dtr_ray.diffusion.weightings import build_weights
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.randomness import keyed_generator
from dtr_ray.training.reports import Report, ReportFile
from dtr_ray.training.state import (
    TrainingDivergedError,
    TrainingState,
    checkpoint_folder,
    latest_checkpoint,
    prune_checkpoints,
)

# Streams of random numbers, so that no two uses share a generator.
_TIMESTEPS, _NOISE, _LABELS, _FLIPS, _LATENTS = range(5)


class Observer:
    """What the loop tells the outside while it runs; the methods do nothing until overridden."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a training step."""

    def progress(self, step: int, phase: str) -> None:
        """The loop is alive: at every step and every batch of samples; must be cheap."""

    def evaluated(self, report: Report) -> None:
        """An evaluation is done and on disk; its pictures are in the trial's folder."""


@dataclass
class Batch:
    """One worker's share of a training batch: inputs x (B, C, H, W), labels, timesteps, noise, clusters."""

    x: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor
    cluster: Tensor | None
    counts: Tensor | None


class Batches:
    """Draws the batch of any step: which images, which timesteps, which noise."""

    def __init__(self, config: TrialConfig, data: ImageData, state: TrainingState, group: Group) -> None:
        self._config = config
        self._data = data
        self._group = group
        self._device = state.loss_sum.device
        self._balancer = state.balancer
        self._null_label = getattr(state.model, "null_label", None)

    def at(self, step: int) -> Batch:
        """The batch of a 0-based step."""
        config, group, device = self._config, self._group, self._device
        size, seed = config.training.batch_size, config.training.seed
        rows = group.slice(torch.arange(size))
        indices = batch_indices(len(self._data), size, step, seed)
        flip = None
        if config.data.horizontal_flip:
            flip = torch.rand(size, generator=keyed_generator(seed, _FLIPS, step))[rows] < 0.5
        latents = keyed_generator(seed, _LATENTS, step, group.rank)
        x = self._data.batch(indices[rows], flip, latents).to(device, non_blocking=True)
        labels = self._data.labels[indices]
        if self._null_label is not None:
            dropped = torch.rand(size, generator=keyed_generator(seed, _LABELS, step))
            labels = torch.where(dropped < config.model.class_dropout_prob, self._null_label, labels)
        generator = keyed_generator(seed, _TIMESTEPS, step)
        cluster = counts = None
        if self._balancer is None:
            t = torch.randint(config.diffusion.num_timesteps, (size,), generator=generator)
        else:
            t, cluster = stratified_timesteps(self._balancer.intervals, size, generator)
            counts = torch.bincount(cluster, minlength=len(self._balancer.intervals)).to(device)
            cluster = group.slice(cluster).to(device)
        noise = torch.randn(
            size, *x.shape[1:], generator=keyed_generator(seed, _NOISE, step, device=device), device=device
        )
        share = (group.slice(v).to(device, non_blocking=True) for v in (labels, t, noise))
        return Batch(x, *share, cluster, counts)


def train(
    config: TrialConfig,
    folder: Path,
    data: ImageData,
    *,
    group: Group | None = None,
    device: torch.device | str = "cpu",
    observer: Observer | None = None,
    start_from: Path | None = None,
    evaluate_untrained: bool = False,
) -> Generator[Report]:
    """Trains until `training.num_steps`, and yields a report after each evaluation.

    Args:
        config: the trial; `folder` holds its checkpoints, grids and reports.
        folder: goes on from the newest checkpoint there, if there is one; the reports made before are
            yielded again, first, so that a caller that was lost as well misses none.
        data: the images, the same on every worker.
        group: the data-parallel workers (default: those of torch.distributed, or one process).
        device: where to train.
        observer: hears of steps and evaluations; on the main worker alone.
        start_from: checkpoint of another trial to start with, when `folder` has none yet.
        evaluate_untrained: evaluate before the first step too, for a figure to compare with.

    Raises:
        TrainingDivergedError: the loss is not finite on some worker.
    """
    group = group or Group.current()
    device = torch.device(device)
    observer = observer if observer is not None and group.is_main else Observer()
    state = TrainingState.build(config, device)
    checkpoint = latest_checkpoint(folder) or start_from
    if checkpoint is not None:
        state.load(checkpoint, device)
    reports = ReportFile(folder / "reports.jsonl")
    known = [report for report in reports.read() if report.step <= state.step]
    yield from known
    evaluator = Evaluator(config, data, group, device)
    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)
    step_fn = _build_step(config, state, schedule, group)
    batches = Batches(config, data, state, group)
    state.model.train()
    while True:
        due = _is_evaluation(config, state.step) and (state.step > 0 or evaluate_untrained)
        if due and not any(report.step == state.step for report in known):
            report = _evaluate(config, folder, state, evaluator, observer)
            if group.is_main:
                reports.append(report)
                known.append(report)
                _save_best(folder, known, config.evaluation.metric)
            observer.evaluated(report)
            yield report
        if state.step >= config.training.num_steps:
            return
        started = time.perf_counter()
        step_fn(batches.at(state.step))
        state.step += 1
        state.train_seconds += time.perf_counter() - started
        observer.progress(state.step, "training")
        save = state.step % config.checkpoint_every_steps == 0 or _is_evaluation(config, state.step)
        if save or state.step % config.training.log_every_steps == 0:
            _log(config, state, group, observer, is_record=state.step % config.training.log_every_steps == 0)
        if save:
            if group.is_main:
                state.save(checkpoint_folder(folder, state.step), config)
                prune_checkpoints(folder, _best_steps(folder))
            group.any(False, device)  # nobody goes on before the checkpoint is there


def _build_step(config: TrialConfig, state: TrainingState, schedule: NoiseSchedule, group: Group):  # type: ignore[no-untyped-def]
    """The function that makes one optimizer step from a batch."""
    device = state.loss_sum.device
    weights = build_weights(config.weighting, schedule)
    weights = None if weights is None else weights.to(device, torch.float32)
    schedule = schedule.to(device)
    model: nn.Module = state.model
    if config.training.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if group.world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    bf16 = config.training.precision == "bf16"
    settings = config.training

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = diffusion_losses(
                model, schedule, batch.x, batch.t, batch.noise, {"y": batch.labels}, weights
            )["loss"]
            if state.balancer is None:
                loss = losses.mean()
            else:
                loss = state.balancer(losses, batch.cluster, batch.counts, world_size=group.world_size)
        loss.backward()
        if state.balancer is not None:
            for parameter in state.balancer.parameters():
                assert parameter.grad is not None
                group.mean_(parameter.grad)
        if settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), settings.gradient_clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        warm = (1 + state.step) / (10 + state.step) if settings.ema_warmup else 1.0
        state.update_ema(min(settings.ema_decay, warm))
        state.loss_sum += loss.detach()
        state.loss_count += 1

    return step


def _log(config: TrialConfig, state: TrainingState, group: Group, observer: Observer, *, is_record: bool) -> None:
    """Checks that the loss is finite on all workers, and records its mean since the last record."""
    loss = group.mean_(state.loss_sum.clone()).item() / max(state.loss_count, 1)
    if not math.isfinite(loss):
        raise TrainingDivergedError(
            f"the loss is {loss} at step {state.step} (mean of the {state.loss_count} steps before); "
            "lower training.lr, or set training.gradient_clip"
        )
    if is_record:
        rate = state.step * config.training.batch_size / max(state.train_seconds, 1e-9)
        observer.metrics(state.step, {"train_loss": loss, "train_images_per_s": rate})
        state.loss_sum.zero_()
        state.loss_count = 0


def _is_evaluation(config: TrialConfig, step: int) -> bool:
    return step % config.evaluation.every_steps == 0 or step == config.training.num_steps


def _evaluate(
    config: TrialConfig, folder: Path, state: TrainingState, evaluator: Evaluator, observer: Observer
) -> Report:
    """Samples from the EMA, writes the grid, and makes the report."""
    result = evaluator.evaluate(state.ema, on_batch=lambda: observer.progress(state.step, "evaluating"))
    grid = Path("grids") / f"{state.step:08d}.png"
    if evaluator.group.is_main:
        (folder / grid).parent.mkdir(parents=True, exist_ok=True)
        result.save_grid(folder / grid)
    checkpoint = checkpoint_folder(folder, state.step).relative_to(folder).as_posix() if state.step else ""
    metrics = {**result.metrics, "train_seconds": state.train_seconds}
    return Report(state.step, metrics, checkpoint, grid.as_posix())


def _save_best(folder: Path, reports: list[Report], metric: str) -> None:
    best = min(reports, key=lambda report: report.metrics[metric])
    temporary = folder / "best.tmp"
    temporary.write_text(json.dumps({"step": best.step, metric: best.metrics[metric]}), encoding="utf-8")
    temporary.replace(folder / "best.json")


def _best_steps(folder: Path) -> set[int]:
    path = folder / "best.json"
    return {json.loads(path.read_text(encoding="utf-8"))["step"]} if path.exists() else set()
