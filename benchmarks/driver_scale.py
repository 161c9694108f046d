"""What a sweep's driver costs a trial, and how that grows with the number of trials.

    python benchmarks/driver_scale.py [--trials 100 1000 5000] [--json]

Each sweep is `run_sweep`, with all that it writes: journal, Optuna study, record files, trials.csv, best.json
and an MLflow store (SQLite). Simulated are the trials, their clock and their 256 GPUs: instead of Ray Tune's
controller, `Controller` asks the sweep's own Searcher, Scheduler and Stopper what Tune asks them, in Tune's
order, and no Ray is started. So the figures lack Tune's own time, and hold all that the driver does between a
report and its decision. CPU time is by part, each without those inside it: `driver` is the thread that
decides, `MLflow` the one that ships the records meanwhile, but for connecting, once a sweep. What the
simulation takes itself (results, the trials' own record files, the queue) is in none.

`last fifth` is what a trial costs when four fifths of the sweep are over. Memory is resident after MLflow is
connected and a hundred trials have ended, and when the last has ended; its growth is over the trials between.
"""

import argparse
import heapq
import itertools
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table

from dtr_ray.config import SweepConfig
from dtr_ray.config.protocol import protocol_of
from dtr_ray.search import results, state, study
from dtr_ray.search.journal import Journal
from dtr_ray.service import cluster, display, mlflow_store, processes, run_log, sweep, tracking, tuning
from dtr_ray.service.deaths import Deaths
from dtr_ray.service.records import RecordWriter, record_path
from dtr_ray.training import Report

NUM_GPUS = 256
METRIC = "fd_efficientnet_lite0_1k"
FAILURE = "TrainingDivergedError: the loss is nan"
_EVERY_STEPS = 100
_PARTS: dict[str, list[tuple[Any, str]]] = {
    "suggest": [(study.Suggester, "suggest")],
    "decide": [(state.SweepState, "_decide")],
    "journal": [(Journal, "write")],
    "study": [(study.Mirror, "update")],
    "results": [(results.ResultFiles, "__call__")],
    "records": [(run_log.RunLog, "__call__")],
    "display": [(display.Display, "__call__")],
    "MLflow": [(tracking.Tracker, "_try_ship")],
    "connect": [(mlflow_store.MlflowStore, "connect")],
}
_TRACKING = ("MLflow", "connect")
_WARM = 100


def sweep_config(num_trials: int, output: Path, **changes: Any) -> SweepConfig:
    """A sweep of so many trials, in `output`."""
    values: dict[str, Any] = {
        "name": "scale",
        "trial": {
            "data": {"name": "digits", "resolution": 8},
            "model": {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
            "training": {"num_steps": 8 * _EVERY_STEPS},
            "sampling": {"sampler": "ddim", "num_steps": 5},
            "evaluation": {
                "every_steps": _EVERY_STEPS,
                "num_samples": 1000,
                "features": "efficientnet_lite0",
            },
        },
        "space": {
            "routing.alpha": {"type": "quniform", "low": 0.5, "high": 8, "step": 0.5},
            "routing.beta": {"type": "uniform", "low": 0.5, "high": 1.0},
            "training.lr": {"type": "loguniform", "low": 1e-5, "high": 1e-2},
            "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "p2"]},
            "weighting.gamma": {"type": "choice", "values": [1, 5], "when": {"weighting.name": "min_snr"}},
        },
        "search": {"num_trials": num_trials, "num_startup_trials": 20, "seed": 3},
        "early_stopping": {"name": "asha", "grace_steps": _EVERY_STEPS, "reduction_factor": 2},
        "resources": {"gpus_per_worker": 1},
        "failures": {"max_failed_trials": num_trials},
        "storage": {"output": str(output)},
        "tracking": {"uri": f"sqlite:///{output / 'mlflow.db'}"},
    }
    return SweepConfig.from_dict(values | changes)


def distance(params: dict[str, Any], number: int, step: int) -> float:
    """A landscape with its best at alpha 4, beta 0.8, lr 1e-3, with noise that the trial's number fixes."""
    penalty = abs(params["routing.alpha"] - 4) + 10 * abs(params["routing.beta"] - 0.8)
    penalty += abs(np.log10(params["training.lr"]) + 3) + 2 * (params["weighting.name"] == "p2")
    noise = np.random.default_rng([number, step]).normal(0, 0.2)
    return float((5 + penalty + noise) * 1000 / (step + 100))


class Trainer:
    """Trials that take no time: their results as SweepTrial gives them, at the simulated clock's times."""

    def __init__(self, config: SweepConfig, folder: Path, data_identity: str) -> None:
        self._folder = folder
        self._protocol = protocol_of(config.trial, data_identity)
        self._num_steps = config.trial.training.num_steps

    def results(self, launch: dict[str, Any], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One trial's results; every 50th diverges, and every 97th dies (`None`) after its first report."""
        trial_id = launch["trial_id"]
        number = int(trial_id[1:])
        seconds = float(np.random.default_rng(number).uniform(50.0, 150.0))
        for step in range(_EVERY_STEPS, self._num_steps + 1, _EVERY_STEPS):
            if number % 50 == 49:
                yield {"done": True, "failed": FAILURE, "seconds": seconds}
                return
            value = distance(params, number, step)
            metrics = {
                METRIC: value,
                f"{METRIC}_stderr": 0.1,
                "train_seconds": 0.9 * step,
                "eval_seconds": 5.0,
            }
            self._record(trial_id, step, metrics)
            report = Report(step, metrics, f"checkpoints/{step:08d}", f"grids/{step:08d}.png", self._protocol)
            yield {"done": False, "report": json.dumps(asdict(report)), "seconds": seconds}
            if number % 97 == 96:
                yield {"died": True, "seconds": seconds}
                return
        yield {"done": True, "failed": "", "seconds": 1.0}

    def _record(self, trial_id: str, step: int, metrics: dict[str, float]) -> None:
        with RecordWriter(record_path(self._folder, trial_id, "worker")) as writer:
            for at in range(step - 80, step + 1, 20):
                writer.metrics(at, {"loss": 1.0 / at, "lr": 1e-3, "grad_norm": 1.0})
            writer.metrics(step, metrics)


class Controller:
    """Asks the sweep's Searcher, Scheduler and Stopper what Ray Tune's controller asks them, in its order."""

    def __init__(self, clock: "Clock", data_identity: str) -> None:
        self._clock, self._data_identity = clock, data_identity
        self.marks: list[Mark] = []
        """One for every hundredth of the trials that have ended."""
        self.seconds = 0.0
        """Simulated."""
        self._ended_before = 0
        self.most_at_once = 0

    def run_trials(
        self,
        config: SweepConfig,
        sweep_state: state.SweepState,
        num_concurrent: int,
        hung: dict[str, str],
        store: dict[str, Any] | None,
    ) -> None:
        """As `tuning.run_trials`."""
        assert store is None
        trainer = Trainer(config, sweep_state.folder, self._data_identity)
        self._ended_before = len(sweep_state.trials) - sweep_state.tally.count("running")
        launch = tuning._launcher(config, sweep_state, store)
        searcher = tuning.SweepSearcher(sweep_state, num_concurrent, launch, Deaths(sweep_state, hung))
        scheduler = tuning.SweepScheduler(sweep_state, searcher)
        stopper = tuning.SweepStopper(sweep_state)
        queue: list[tuple[float, int, str, Iterator[dict[str, Any]], dict[str, Any]]] = []
        numbers = itertools.count()

        def push(tune_id: str, coming: Iterator[dict[str, Any]]) -> None:
            result = next(coming)
            heapq.heappush(queue, (self.seconds + result["seconds"], next(numbers), tune_id, coming, result))

        asked = {name: self._clock.timed("rest", function) for name, function in (
            ("stop_all", stopper.stop_all), ("suggest", searcher.suggest),
            ("result", scheduler.on_trial_result), ("complete", searcher.on_trial_complete),
        )}  # fmt: skip
        with self._clock.part("simulation"):
            while not asked["stop_all"]():
                while isinstance(launch := asked["suggest"](tune_id := f"tune{next(numbers)}"), dict):
                    params = sweep_state.trials[launch["trial_id"]].params
                    push(tune_id, trainer.results(launch, params))
                self.most_at_once = max(self.most_at_once, len(queue))
                self._mark(sweep_state)
                if not queue:
                    break
                self.seconds, _, tune_id, coming, result = heapq.heappop(queue)
                trial: Any = SimpleNamespace(trial_id=tune_id)
                if result.get("died"):
                    asked["complete"](tune_id, None, error=True)
                elif result["done"] or asked["result"](None, trial, result) == TrialScheduler.STOP:
                    asked["complete"](tune_id, result)
                else:
                    push(tune_id, coming)

    def _mark(self, sweep_state: state.SweepState) -> None:
        ended = len(sweep_state.trials) - sweep_state.tally.count("running") - self._ended_before
        every = max(1, sweep_state.config.search.num_trials // 100)
        if ended >= every * (len(self.marks) + 1):
            # The records of most trials before have been sent then, as they are where a trial takes hours.
            while self._clock.shipped < ended - sweep_state.config.search.num_trials // 50 - _WARM:
                time.sleep(0.05)
            shipped, seconds = self._clock.shipped, dict(self._clock.seconds)
            self.marks.append(Mark(ended, shipped, seconds, _resident_mb()))


class Mark(NamedTuple):
    """Where a sweep stood: trials ended, their runs shipped, CPU seconds by part, resident MB."""

    ended: int
    shipped: int
    seconds: dict[str, float]
    mb: float


class Clock:
    """CPU seconds of threads by part; a part does not hold those inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.shipped = 0
        """Runs of trials whose end MLflow has."""
        self._open: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts for a part what its thread does meanwhile."""
        inside = self._open["MLflow" if name in _TRACKING else "driver"]
        inside.append(0.0)
        started = time.thread_time()
        try:
            yield
        finally:
            spent = time.thread_time() - started
            self.seconds[name] += spent - inside.pop()
            if inside:
                inside[-1] += spent

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as runs shipped."""

        def call(*args: Any, **kwargs: Any) -> Any:
            function(*args, **kwargs)
            self.shipped += 1

        return call

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def run(num_trials: int, output: Path, num_gpus: int = NUM_GPUS, **changes: Any) -> dict[str, Any]:
    """Runs a simulated sweep below `output`; returns its outcome and figures."""
    config = sweep_config(num_trials, output, **changes)
    folder = output / config.name
    clock = Clock()
    identity = "digits-8-simulated"
    controller = Controller(clock, identity)
    started = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        enter: Callable[[Any], Any] = stack.enter_context
        enter(patch.object(sweep, "identity_of", lambda *_: identity))
        enter(patch.object(cluster, "connect", lambda **_: None))
        enter(patch.object(cluster, "nodes", lambda: [cluster.Node(4 * num_gpus, num_gpus)]))
        enter(patch.object(sweep, "fetch_on_nodes", lambda _: None))
        enter(patch.object(processes, "dismiss", lambda _: None))
        enter(patch.object(tuning, "run_trials", controller.run_trials))
        # The trials end faster than MLflow can take them: it is waited for, however long that takes.
        enter(patch.object(sweep, "_TRACKING_TIMEOUT_S", 1e5))
        for name, places in _PARTS.items():
            for owner, method in places:
                enter(patch.object(owner, method, clock.timed(name, getattr(owner, method))))
        enter(patch.object(mlflow_store.MlflowStore, "end", clock.counting(mlflow_store.MlflowStore.end)))
        enter(redirect_stdout(enter((output / "printed.txt").open("w", encoding="utf-8"))))
        outcome = sweep.run_sweep(config, folder, resume=True)
    return {"outcome": outcome, "config": config, "folder": folder, "at_once": controller.most_at_once,
            "simulated_s": controller.seconds, "cpu_s": dict(clock.seconds),
            "wall_s": time.perf_counter() - started[0], "process_s": time.process_time() - started[1],
            "marks": controller.marks, "peak_mb": _peak_mb(), "mb": _sizes(folder, output)}  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _sizes(folder: Path, output: Path) -> dict[str, float]:
    files = {"journal": "journal.jsonl", "study": "study.db", "trials.csv": "trials.csv"}
    sizes = {name: (folder / file).stat().st_size / 1e6 for name, file in files.items()}
    return sizes | {"MLflow": (output / "mlflow.db").stat().st_size / 1e6}


def _one(num_trials: int) -> dict[str, Any]:
    """The figures of a sweep, as plain values."""
    logging.getLogger("dtr_ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as output:
        found = run(num_trials, Path(output))
    outcome = found.pop("outcome")
    del found["config"], found["folder"]
    ended: dict[str, int] = defaultdict(int)
    for trial in outcome.state.trials.values():
        ended[trial.status] += 1
    return found | {"trials": num_trials, "ended": ended, "waiting": outcome.records_waiting}


def _driver(seconds: dict[str, float]) -> float:
    return sum(seconds.get(part, 0.0) for part in (*_PARTS, "rest") if part not in _TRACKING)


def _last_fifth(found: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds a trial of the driver, and of MLflow's thread, when four fifths were over."""
    marks = [Mark(*mark) for mark in found["marks"]]
    end = marks[-1]
    start = next(mark for mark in marks if mark.ended >= 0.8 * end.ended)
    driver = (_driver(end.seconds) - _driver(start.seconds)) / max(1, end.ended - start.ended)
    # The thread may lag behind: its share is that of the runs which it sent meanwhile.
    mlflow = (end.seconds.get("MLflow", 0.0) - start.seconds.get("MLflow", 0.0)) / max(
        1, end.shipped - start.shipped
    )
    return driver, mlflow


def _row(found: dict[str, Any]) -> list[str]:
    number, cpu = found["trials"], found["cpu_s"]
    driver, mlflow = _last_fifth(found)
    times = [_driver(cpu) / number, cpu["MLflow"] / number, driver, mlflow]
    times += [cpu.get(part, 0.0) / number for part in (*_PARTS, "rest") if part not in _TRACKING]
    marks = [Mark(*mark) for mark in found["marks"]]
    warm, end = next((mark for mark in marks if mark.ended >= _WARM), marks[-1]), marks[-1]
    grown = 1024 * (end.mb - warm.mb) / (end.ended - warm.ended) if end.ended > warm.ended else 0.0
    sizes = [f"{found['mb'][name]:.1f}" for name in ("journal", "study", "trials.csv", "MLflow")]
    memory = [f"{warm.mb:.0f}, {end.mb:.0f}", f"{grown:.0f}"]
    return [str(number), *(f"{1000 * s:.1f}" for s in times), f"{found['wall_s']:.0f}", *memory, *sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--json", action="store_true", help="one sweep in this process; prints its figures")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(_one(options.trials[0])))
        return
    title = (
        "CPU milliseconds a trial, wall seconds, resident MB at first and last, its KB a trial, files in MB"
    )
    table = Table(title=title, title_justify="left")
    parts = [part for part in (*_PARTS, "rest") if part not in _TRACKING]
    heads = ["trials", "driver", "MLflow", "driver, last fifth", "MLflow, last fifth", *parts, "wall"]
    heads += ["resident", "KB a trial", "journal", "study", "csv", "mlflow.db"]
    for head in heads:
        table.add_column(head, justify="right")
    for number in options.trials:
        # Of its own, so that memory is that sweep's.
        command = [sys.executable, __file__, "--json", "--trials", str(number)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        table.add_row(*_row(json.loads(printed.splitlines()[-1])))
    Console(width=190).print(table)


if __name__ == "__main__":
    main()
