"""A trial over several Ray Train workers, as a generator of reports.

Ray Train gives a worker group back only when its training function returns; a trial that is killed from
outside may keep its placement group for ever. So no trial is killed: after each report the workers wait at
a gate until the trial is told to go on or to stop, and a stopped one returns like a finished one.
"""

import asyncio
import threading
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dtr_ray.config import TrialConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.distributed import Group
from dtr_ray.service.worker import run_worker
from dtr_ray.training import Report

_POLL_S = 1.0
_STOP_TIMEOUT_S = 120.0


@ray.remote(num_cpus=0)
class Gate:
    """Where the main worker leaves its reports and waits for the decision."""

    def __init__(self) -> None:
        self._report: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._decision: asyncio.Queue[bool] = asyncio.Queue()
        self._stopped = False

    async def submit(self, report: dict[str, Any]) -> bool:
        """The worker's side: leaves a report, and returns whether to go on."""
        if self._stopped:
            return False
        self._report.put_nowait(report)
        return await self._decision.get()

    async def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """The trial's side: the next report, or None if there is none within the time."""
        try:
            return await asyncio.wait_for(self._report.get(), timeout_s)
        except TimeoutError:
            return None

    async def decide(self, go_on: bool) -> None:
        """The trial's side: lets the worker go on, or stop for good."""
        self._stopped = self._stopped or not go_on
        self._decision.put_nowait(go_on)


def run_on_train(
    config: TrialConfig,
    sweep_folder: Path,
    trial_id: str,
    resources: ResourcesConfig,
    *,
    start_from: Path | None = None,
    evaluate_untrained: bool = False,
) -> Generator[Report]:
    """Trains one trial with Ray Train, yielding its reports; closing the generator stops the workers."""
    gate = Gate.remote()  # type: ignore[attr-defined]
    settings = {
        "trial": config.to_dict(),
        "trial_id": trial_id,
        "sweep_folder": str(sweep_folder),
        "start_from": None if start_from is None else str(start_from),
        "evaluate_untrained": evaluate_untrained,
        "gate": gate,
    }
    trainer = _trainer(settings, resources)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # handed to the generator's caller below
            errors.append(error)

    thread = threading.Thread(target=fit, name=f"ray-train-{trial_id}", daemon=True)
    thread.start()
    waiting = False
    try:
        while True:
            if waiting:
                ray.get(gate.decide.remote(True))
                waiting = False
            report = ray.get(gate.next_report.remote(_POLL_S))
            if report is not None:
                waiting = True
                yield Report(**report)
            elif not thread.is_alive():
                break
    finally:
        ray.get(gate.decide.remote(False))
        thread.join(_STOP_TIMEOUT_S)
        ray.kill(gate)
    if errors:
        raise errors[0]


def _trainer(settings: dict[str, Any], resources: ResourcesConfig) -> TorchTrainer:
    need: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        need["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        _train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=resources.workers_per_trial,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker=need,
            placement_strategy="PACK",
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=settings["trial_id"],
            storage_path=str(Path(settings["sweep_folder"], ".ray", "train").resolve()),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _train_worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    config = TrialConfig.from_dict(settings["trial"])
    start_from = Path(settings["start_from"]) if settings["start_from"] else None
    group = Group.current()
    reports = run_worker(
        config,
        Path(settings["sweep_folder"]),
        settings["trial_id"],
        start_from=start_from,
        evaluate_untrained=settings["evaluate_untrained"],
    )
    for report in reports:
        go_on = ray.get(settings["gate"].submit.remote(asdict(report))) if group.is_main else True
        if not group.from_main(go_on):
            reports.close()
            return
