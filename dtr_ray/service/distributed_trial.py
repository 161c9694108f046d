"""Trials over several Ray Train workers, as generators of reports.

Ray Train gives a worker group back only when its training function returns; a group whose owner is killed
from outside may keep its resources for ever. So no trial is killed: after each report the workers wait at a
gate until they are told to go on or to stop, and a stopped trial ends like a finished one. The workers then
wait there for the next trial, since to start them takes longer than many a trial.
"""

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from dtr_ray import log_lines
from dtr_ray.config import TrialConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.distributed import Group
from dtr_ray.service.draining import draining, own_node
from dtr_ray.service.elastic import for_workers
from dtr_ray.service.gate import Gate, Message, WorkersLostError, exchange
from dtr_ray.service.worker import enter, release_memory, run_worker
from dtr_ray.training import Report
from dtr_ray.training.leaving import LeftError

_STOP_TIMEOUT_S = 120.0


class Workers:
    """A group of Ray Train workers that train one trial after the other.

    After an error they are gone, and `usable` is false.
    """

    def __init__(
        self, name: str, folder: Path, resources: ResourcesConfig, num_workers: int | None = None
    ) -> None:
        """Starts them, fewer (`num_workers`) than the resources say where there is no room for more.

        `folder` is for what Ray Train writes, `name` its own in there.
        """
        self._full = resources.workers_per_trial
        self.num_workers = num_workers or self._full
        self._gate = Gate()
        settings = {"gate": self._gate.actor, "use_gpu": bool(resources.gpus_per_worker)}
        self._fit = _Fit(
            _trainer(name, folder, settings, resources, self.num_workers),
            name=f"ray-train-{name}",
            daemon=True,
        )
        self._fit.start()
        self._free = False

    @property
    def usable(self) -> bool:
        """Whether they can take another trial."""
        return self._fit.is_alive()

    def train(
        self,
        config: TrialConfig,
        sweep_folder: Path,
        trial_id: str,
        *,
        start_from: Path | None = None,
        evaluate_untrained: bool = False,
        weights: Sequence[dict[str, Any]] = (),
        store: dict[str, Any] | None = None,
    ) -> Generator[Report]:
        """Trains one trial, yielding its reports; closing the generator stops it where it is.

        `weights` and `store` are as for `run_worker`.

        Raises what a worker's training raised, or WorkersLostError.
        """
        settings = {
            "config": for_workers(config, self.num_workers, self._full).to_dict(),
            "sweep_folder": str(sweep_folder),
            "working_folder": str(Path.cwd()),
            "log_format": log_lines.chosen(None),
            "trial_id": trial_id,
            "start_from": None if start_from is None else str(start_from),
            "evaluate_untrained": evaluate_untrained,
            "weights": list(weights),
            # Without the process that waits for the reports the workers are lost.
            "depends_on": [own_node()],
            "store": store,
        }
        self._wait_free()
        self._free = False
        order: Message = {"train": settings}
        try:
            while True:
                message = self._exchange(order)
                if "report" not in message:
                    self._free = True
                    return
                yield Report(**message["report"])
                order = {"go_on": True}
        except GeneratorExit:
            # Workers that wait at the gate are free at once.
            self._gate.last_order({"stop": True})
            raise

    def leave(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Ends the workers; raises WorkersLostError where they take longer than `timeout_s`."""
        if self._fit.is_alive():
            self._gate.last_order({"leave": True})
            self._fit.join(timeout_s)
        self._gate.close()
        if self._fit.is_alive() and timeout_s:
            raise WorkersLostError(f"workers did not end within {timeout_s:.0f} s")

    def _wait_free(self) -> None:
        """Waits for workers that have just been started, or stopped."""
        while not self._free:
            self._free = "report" not in self._next_message(may_leave=True)

    def _exchange(self, order: Message) -> Message:
        self._gate.order(order)
        return self._next_message()

    def _next_message(self, *, may_leave: bool = False) -> Message:
        """`may_leave`: no worker trains, so that none would see that this machine is to go."""
        while True:
            if may_leave and draining([own_node()]):
                raise LeftError("its machine is to go")
            message = self._gate.next_message()
            if message is not None:
                return message
            if not self._fit.is_alive():
                raise self._fit.cause() from self._fit.error


def run_on_train(
    config: TrialConfig,
    sweep_folder: Path,
    trial_id: str,
    resources: ResourcesConfig,
    *,
    start_from: Path | None = None,
    evaluate_untrained: bool = False,
    weights: Sequence[dict[str, Any]] = (),
) -> Generator[Report]:
    """Trains one trial with workers of its own, yielding its reports; errors as of `Workers.train`."""
    workers = Workers(trial_id, sweep_folder / ".ray" / "train", resources)
    timeout_s = _STOP_TIMEOUT_S
    reports = workers.train(
        config,
        sweep_folder,
        trial_id,
        start_from=start_from,
        evaluate_untrained=evaluate_untrained,
        weights=weights,
    )
    try:
        with closing(reports):
            yield from reports
    except KeyboardInterrupt:
        # This process ends, and its workers with it: their next report may be an hour away.
        timeout_s = 0.0
        raise
    finally:
        workers.leave(timeout_s)


class _Fit(threading.Thread):
    """Ray Train's `fit`, which returns when all workers have, beside the one who takes the reports."""

    def __init__(self, trainer: TorchTrainer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        """Ends with the workers, or their error."""
        try:
            self._trainer.fit()
        except Exception as error:  # raised to the one who waits for a message
            self.error = error

    def cause(self) -> Exception:
        """The training's own error among what the workers raised, if there is one."""
        error = self.error
        failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
        own = [failure for failure in failures if not _is_of_others(failure)]
        own.sort(key=lambda failure: not isinstance(failure, LeftError))
        return own[0] if own else WorkersLostError(str(failures[0] if failures else error))


def _is_of_others(error: BaseException) -> bool:
    """Whether the worker is gone, or stopped because another one was."""
    is_of_ray = type(error).__module__.partition(".")[0] == "ray"
    if is_of_ray or isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "by peer" in text)


def _trainer(
    name: str, folder: Path, settings: dict[str, Any], resources: ResourcesConfig, num_workers: int
) -> TorchTrainer:
    need: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        need["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        _work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker=need,
            placement_strategy="PACK",
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name, storage_path=str(folder.resolve()), failure_config=FailureConfig(max_failures=0)
        ),
    )


def _work(settings: dict[str, Any]) -> None:
    """What every worker runs: trials, as the gate orders."""
    group = Group.current()

    def next_order(message: Message) -> Message:
        return group.from_main(exchange(settings["gate"], message) if group.is_main else {})

    order = next_order({})
    while "train" in order:
        task = order["train"]
        enter(task["working_folder"])
        log_lines.follow(task["log_format"], trial=task["trial_id"])
        reports = run_worker(
            TrialConfig.from_dict(task["config"]),
            Path(task["sweep_folder"]),
            task["trial_id"],
            use_gpu=settings["use_gpu"],
            start_from=Path(task["start_from"]) if task["start_from"] else None,
            **{name: task[name] for name in ("evaluate_untrained", "weights", "depends_on", "store")},
        )
        with closing(reports):
            for report in reports:
                order = next_order({"report": asdict(report)})
                if "go_on" not in order:
                    break
        release_memory()
        if "leave" not in order:
            order = next_order({})
