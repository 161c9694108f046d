"""The training loop: a generator that yields a report at every evaluation, and trains on when it is resumed.

All randomness is keyed by the step, so a resumed run repeats the uninterrupted one bit for bit on the CPU,
and the number of workers changes rounding alone (but for an ADM's dropout, which each worker draws for
itself).
"""

import math
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from dtr_ray.config import TrialConfig
from dtr_ray.config.protocol import differences, protocol_of
from dtr_ray.data import ImageData
from dtr_ray.disk import tried
from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.training.batches import Batches
from dtr_ray.training.leaving import LeftError, MustLeave, all_leave, stays
from dtr_ray.training.prefetch import batches_ahead
from dtr_ray.training.reports import Report, ReportFile
from dtr_ray.training.retention import best_and_last, keep, save_checkpoint
from dtr_ray.training.state import (
    TrainingDivergedError,
    TrainingState,
    checkpoint_folder,
    latest_checkpoint,
)
from dtr_ray.training.step import build_step


class Observer:
    """What the loop tells the outside while it runs; the methods do nothing until overridden."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a training step; a resumed run repeats those after its checkpoint."""

    def progress(self, step: int, phase: str) -> None:
        """The loop is alive, and turns to `phase`; must be cheap.

        "training" comes after each training step, "evaluating" before and after each batch of samples,
        "checkpointing" before a checkpoint is written, and may wait.
        """

    def settle(self) -> None:
        """All numbers so far are on the disk when this returns: a checkpoint is to be written, after which no
        run repeats them. Raises OSError where there is no room; it is called again then.
        """

    def after_checkpoint(self) -> None:
        """A checkpoint is whole and on disk."""

    def evaluated(self, report: Report) -> None:
        """An evaluation is done and on disk, its pictures too; told again if the run was lost right then."""


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
    must_leave: MustLeave = stays,
) -> Generator[Report]:
    """Trains until `training.num_steps`, and yields a report after each evaluation.

    Args:
        config: the trial.
        folder: of this trial alone; holds its checkpoints, grids and reports, `best.json` (step and value
            of the best report), and is shared by all workers. Training goes on from the newest whole
            checkpoint there, if there is one; the reports made before are yielded again, first, so that
            a caller that was lost as well misses none.
        data: the images, the same on every worker.
        group: the data-parallel workers (default: those of torch.distributed, or one process).
        device: where to train.
        observer: hears of steps and evaluations; on the main worker alone.
        start_from: checkpoint of another trial to start with, when `folder` has none yet.
        evaluate_untrained: evaluate before the first step too, for a figure to compare with.
        must_leave: whether this worker is to stop where it is; training, it writes a checkpoint first.

    Raises:
        LeftError: some worker was to leave.
        TrainingDivergedError: on some worker the loss is not finite, or the weights or samples are not.
        ValueError: the workers cannot share a batch evenly, a checkpoint is of another model, or the
            reports there were measured otherwise, such as on other images.
    """
    group, device = group or Group.current(), torch.device(device)
    observer = observer if observer is not None and group.is_main else Observer()
    _check_workers(config, group)
    state = TrainingState.build(config, device)
    if data.captions is not None:
        state.learn_no_caption(data.captions.tokens(torch.tensor([0]))[0])
    reports = ReportFile(folder / "reports.jsonl")
    _restore(state, config, folder, group, start_from)
    known = [report for report in group.from_main(reports.read()) if report.step <= state.step]
    _check_protocols(config, data, known, folder)
    if known and known[-1].step == state.step:
        observer.evaluated(known[-1])
    yield from known
    if state.step >= config.training.num_steps and known and known[-1].step == state.step:
        if group.is_main:
            keep(config, folder, known, state.saved_step)
        return
    evaluator = Evaluator(config, data, group, device)
    step = build_step(config, state, group)
    batches = Batches(
        config,
        data,
        group,
        device,
        null_label=getattr(state.model, "null_label", None),
        intervals=None if state.balancer is None else state.balancer.intervals,
    )
    state.model.train()
    started = time.perf_counter()
    tidy = best_and_last(config, folder, state, known) if group.is_main else nullcontext()
    with tidy, batches_ahead(batches, config.training.num_steps) as batch_at:
        while True:
            due = _is_evaluation(config, state.step) and (state.step > 0 or evaluate_untrained)
            if due and not (known and known[-1].step == state.step):
                observer.progress(state.step, "evaluating")
                report = _evaluate(config, data, folder, state, evaluator, observer, must_leave)
                known.append(report)
                _on_main(group, device, folder, partial(_book, config, folder, state, reports, known))
                observer.evaluated(report)
                yield report
                started = time.perf_counter()
            if state.step >= config.training.num_steps:
                return
            step(batch_at(state.step))
            state.step += 1
            state.route()
            observer.progress(state.step, "training")
            leave = all_leave(must_leave, state.step, group, device)
            due = state.step % config.checkpoint_every_steps == 0 or _is_evaluation(config, state.step)
            save = due or leave
            record = (
                state.step % config.training.log_every_steps == 0 or state.step == config.training.num_steps
            )
            if save or record:
                check_losses(state, group)
                now = time.perf_counter()
                state.train_seconds, started = state.train_seconds + now - started, now
            if record:
                _record(config, state, observer)
            if save:
                observer.progress(state.step, "checkpointing")
                _save(config, folder, state, group, known, observer)
                observer.after_checkpoint()
                started = time.perf_counter()
            if leave:
                raise LeftError(f"left its machine after step {state.step}, with a checkpoint")


def _check_workers(config: TrialConfig, group: Group) -> None:
    workers = group.world_size
    if config.training.batch_size % workers:
        raise ValueError(
            f"training.batch_size {config.training.batch_size} cannot be shared evenly by {workers} workers: "
            f"make it a multiple of {workers}"
        )
    if config.evaluation.num_samples < workers:
        raise ValueError(
            f"evaluation.num_samples {config.evaluation.num_samples} is less than the {workers} workers"
        )


def _restore(
    state: TrainingState, config: TrialConfig, folder: Path, group: Group, start_from: Path | None
) -> None:
    """Loads the newest checkpoint, the same on all workers, or the one of another trial to start with."""
    newest = latest_checkpoint(folder) if group.is_main else None
    # Workers on other machines may have the folder elsewhere.
    step = group.from_main(None if newest is None else int(newest.name))
    if step is not None:
        state.load(checkpoint_folder(folder, step), config)
    elif start_from is not None:
        state.load(start_from, config)
        state.losses.clear()
        save = partial(state.save, checkpoint_folder(folder, state.step), config)
        _on_main(group, state.device, folder, save, state.num_bytes)
    group.wait(state.device)


def check_losses(state: TrainingState, group: Group) -> None:
    """Reads the losses since the last check, and finds the first that is not finite on some worker."""
    losses = group.mean_(torch.stack(state.pending)).tolist()
    state.pending.clear()
    for step, loss in enumerate(losses, state.step - len(losses) + 1):
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss} at step {step}: lower training.lr, or set training.gradient_clip"
            )
    state.losses += losses


def _record(config: TrialConfig, state: TrainingState, observer: Observer) -> None:
    """Tells the mean loss since the last record, the mean speed of the whole run, and the balance."""
    rate = state.step * config.training.batch_size / max(state.train_seconds, 1e-9)
    loss = math.fsum(state.losses) / len(state.losses)
    balance = {} if state.balancer is None else state.balancer.metrics()
    observer.metrics(state.step, {"train_loss": loss, "train_images_per_s": rate, **balance})
    state.losses.clear()


def _is_evaluation(config: TrialConfig, step: int) -> bool:
    return step % config.evaluation.every_steps == 0 or step == config.training.num_steps


def _check_protocols(config: TrialConfig, data: ImageData, known: list[Report], folder: Path) -> None:
    """Refuses to go on where the reports made before do not compare with those to come."""
    for report in known:
        proxy = "metric" in report.protocol and report.protocol["metric"] == config.evaluation.proxy_metric
        found = report.protocol and differences(
            protocol_of(config, data.identity, proxy=proxy), report.protocol
        )
        if found:
            raise ValueError(
                f"{folder}: since its report of step {report.step} the protocol has changed "
                f"({'; '.join(found)}): put that back, or start anew in another folder"
            )


def _evaluate(
    config: TrialConfig,
    data: ImageData,
    folder: Path,
    state: TrainingState,
    evaluator: Evaluator,
    observer: Observer,
    must_leave: MustLeave,
) -> Report:
    """Samples from the EMA, writes the grid, and makes the report; early ones may be of the proxy."""
    name, proxy = config.evaluation.metric_at(state.step), config.evaluation.is_proxy(state.step)

    def on_batch() -> None:
        observer.progress(state.step, "evaluating")
        # The others cannot go on without this worker, and end with it.
        if must_leave():
            raise LeftError(f"left its machine in the evaluation of step {state.step}")

    result = evaluator.evaluate(state.ema, on_batch=on_batch, proxy=proxy)
    if not math.isfinite(result.metrics[name]):
        raise TrainingDivergedError(
            f"{name} is {result.metrics[name]} at step {state.step}, since samples are not finite numbers: "
            "lower training.lr, or set training.gradient_clip"
        )
    grid = Path("grids") / f"{state.step:08d}.png"
    _on_main(evaluator.group, state.device, folder, partial(result.save_grid, folder / grid))
    checkpoint = checkpoint_folder(folder, state.step).relative_to(folder).as_posix() if state.step else ""
    seconds = evaluator.group.from_main(state.train_seconds)
    metrics = {**result.metrics, "train_seconds": seconds}
    protocol = protocol_of(config, data.identity, proxy=proxy)
    return Report(state.step, metrics, checkpoint, grid.as_posix(), protocol)


def _save(
    config: TrialConfig,
    folder: Path,
    state: TrainingState,
    group: Group,
    known: list[Report],
    observer: Observer,
) -> None:
    """Writes a checkpoint, unless its weights are not finite; nobody goes on before it is there."""
    if group.any(not state.is_finite(), state.device):
        raise TrainingDivergedError(
            f"the weights are not finite after step {state.step}: "
            "lower training.lr, or set training.gradient_clip"
        )
    _on_main(group, state.device, folder, observer.settle)
    _on_main(
        group, state.device, folder, partial(save_checkpoint, config, folder, state, known), state.num_bytes
    )


def _book(
    config: TrialConfig, folder: Path, state: TrainingState, reports: ReportFile, known: list[Report]
) -> None:
    """Has the newest report on the disk, and lets go of a checkpoint that is the best no longer."""
    reports.append(known[-1])
    keep(config, folder, known, state.saved_step, state.saved_before)


def _on_main(
    group: Group, device: torch.device, folder: Path, write: Callable[[], object], need_bytes: int = 0
) -> None:
    """Has the main worker write, and all wait: while the disk is full, in rounds that no time-out ends."""
    while group.any(group.is_main and not tried(folder, write, need_bytes), device):
        pass
