"""Sweeps of trials that train in a second, in this process or as a command that can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_trials import TINY

from dtr_ray.config import SweepConfig, override
from dtr_ray.search.journal import TrialRecord, read_events, replay
from dtr_ray.service.attempts import Attempt, read_attempts
from dtr_ray.service.sweep import Outcome

ROOT = Path(__file__).parents[1]
METRIC = "fd_efficientnet_lite0_32"
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TIMES = {"train_seconds", "eval_seconds"}
SWEEP: dict[str, Any] = {
    "name": "tiny",
    "trial": override(
        TINY,
        {
            "training.num_steps": 40,
            "training.log_every_steps": 4,
            "training.checkpoint_every_steps": 5,
            "evaluation.every_steps": 10,
            "evaluation.num_samples": 32,
            "evaluation.grid_images": 20,
        },
    ),
    "space": {
        "routing.alpha": {"type": "quniform", "low": 0.5, "high": 8.0, "step": 0.5},
        "routing.beta": {"type": "uniform", "low": 0.3, "high": 1.0},
        "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "ant_uw"]},
        "weighting.gamma": {"type": "choice", "values": [1, 5], "when": {"weighting.name": "min_snr"}},
    },
    "search": {"num_trials": 6, "num_startup_trials": 3, "seed": 3},
    "early_stopping": {"name": "asha", "grace_steps": 10, "reduction_factor": 2},
}


@dataclass(frozen=True)
class Finished:
    """A finished sweep."""

    config: SweepConfig
    folder: Path
    outcome: Outcome
    lines: str
    """What it printed, its standard output being no terminal."""


def tiny_sweep(output: Path, **changes: Any) -> SweepConfig:
    """SWEEP with changes, below `output`: `tiny_sweep(tmp_path, search__num_trials=2)`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return SweepConfig.from_dict(override(SWEEP, {"storage.output": str(output), **dotted}))


def folder_of(config: SweepConfig) -> Path:
    return Path(config.storage.output) / config.name


def records(folder: Path) -> dict[str, TrialRecord]:
    """The sweep's trials, as its journal has them now."""
    return replay(read_events(folder / "journal.jsonl"))


def timeless(record: TrialRecord) -> dict[str, Any]:
    """A trial without the times that it took, and how often its process died."""
    leave_out = ("wall_s", "retries", "moves", "retry_reason")
    values = {k: v for k, v in vars(record).items() if k not in leave_out}
    reports = {s: {k: v for k, v in m.items() if k not in TIMES} for s, m in record.reports.items()}
    return {**values, "reports": reports}


def attempts(folder: Path, trial_id: str) -> list[Attempt]:
    return read_attempts(folder / "trials" / trial_id)


def expected_log_steps(config: SweepConfig, record: TrialRecord) -> list[int]:
    """Training steps at which a trial's loss is to be logged."""
    every, total = config.trial.training.log_every_steps, config.trial.training.num_steps
    return [s for s in range(1, record.last_step + 1) if s % every == 0 or s == total]


def wait_until(
    condition: Callable[[], Any], timeout_s: float, what: str = "", *, poll_s: float = 0.02
) -> Any:
    """What `condition` returns once that is true; TimeoutError if it never is."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(poll_s)
    raise TimeoutError(f"not within {timeout_s} s: {what or condition}")


class SweepCommand:
    """`python -m dtr_ray.sweep` in its own session, with its own Ray; all its descendants are known."""

    def __init__(self, config: SweepConfig, *options: str, **environment: str) -> None:
        output = Path(config.storage.output)
        output.mkdir(parents=True, exist_ok=True)
        file = output / f"{config.name}.yaml"
        file.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        self._mark = f"DTR_RAY_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        self._out = (output / f"{value}.out").open("w+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dtr_ray.sweep", str(file), *options],
            env={**env, name: value, "PYTHONPATH": path, **environment},
            cwd=output,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout_s: float = 100.0) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    @property
    def output(self) -> str:
        self._out.flush()
        return Path(self._out.name).read_text(encoding="utf-8")

    def signal(self, signum: int, receivers: list[int]) -> None:
        """To processes by id, or process groups by their negative id, that are still there."""
        for pid in receivers:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue

    def processes(self) -> dict[int, str]:
        """All processes that descend from the command, orphans too: their command lines by id.

        They are of its session, or have its mark in their environment (Ray's titles write over that).
        """
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                environment = (folder / "environ").read_bytes().split(b"\0")
                if session == self.process.pid or self._mark.encode() in environment:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line:
                        found[int(folder.name)] = line[:120]
            except OSError:
                continue
        return found

    def wait_gone(self, timeout_s: float, *, but_agents: bool = False) -> float:
        """Seconds until no process of it is left.

        With `but_agents` two of Ray's own may be: when their parent was killed they try for a minute to
        report it, and touch nothing of the sweep.
        """

        def left() -> dict[int, str]:
            found = self.processes()
            return {p: line for p, line in found.items() if not (but_agents and line.startswith(_AGENTS))}

        started = time.monotonic()
        try:
            wait_until(lambda: not left(), timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"still there after {timeout_s} s: {left()}") from error
        return time.monotonic() - started

    def end(self) -> None:
        """Kills what is left of it, each process by its id."""
        for _ in range(20):
            found = self.processes()
            self.signal(signal.SIGKILL, list(found))
            if self.process.poll() is not None and not found:
                break
            time.sleep(0.2)
        self._out.close()


@contextmanager
def sweep_command(config: SweepConfig, *options: str, **environment: str) -> Iterator[SweepCommand]:
    command = SweepCommand(config, *options, **environment)
    try:
        yield command
    finally:
        command.end()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file in a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            found[str(path.relative_to(folder))] = (stat.st_mtime_ns, stat.st_size)
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
