"""One sweep among faults: started and resumed as its user would, and watched for the moment to strike."""

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from chaos.driver import Driver
from chaos.world import LAN, SHARED, World
from tiny_sweeps import attempts, folder_of, records, tiny_sweep

from dtr_ray.service.attempts import Attempt

PHASES = ("loading", "training", "evaluating", "checkpointing")
EVERY, CHECKPOINT, STEPS = 60, 20, 240
SWEEP: dict[str, Any] = {
    "search__num_trials": 26,
    "trial__training__num_steps": STEPS,
    "trial__training__batch_size": 256,
    "trial__training__log_every_steps": 5,
    "trial__training__checkpoint_every_steps": CHECKPOINT,
    "trial__evaluation__every_steps": EVERY,
    "trial__evaluation__num_samples": 64,
    "trial__evaluation__batch_size": 16,
    "early_stopping__grace_steps": EVERY,
    "resources__max_concurrent": 2,
    # As for machines that may be taken away: each of these faults may hit the same trial.
    "failures__retries": 20,
    # Ray's head places nothing for up to 420 s after a machine was cut off while it was asked for resources.
    "failures__stall_timeout_s": 600,
    "failures__hang_timeout_s": 10,
    "failures__hang_factor": 5,
}
_AIM_S, _SETTLE_S, _END_S = 25.0, 700.0, 800.0


@dataclass
class Doing:
    """What a trial's process is at."""

    trial_id: str
    phase: str
    attempt: Attempt
    pid: int
    """Its process, as this host counts."""


@dataclass
class Blow:
    """One fault that took effect."""

    fault: str
    phase: str
    note: str
    attempts_before: dict[str, int]
    """Attempts of each trial up to then."""
    reached: dict[str, int]
    """Steps of each trial, where it may have lost its own account of them."""
    seconds: float = 0.0
    resumed: int = 0
    """Times that the sweep had to be resumed by hand."""


@dataclass
class Case:
    """A sweep in the small world."""

    world: World
    name: str
    rng: random.Random
    changes: dict[str, Any]
    has: frozenset[str]
    blows: list[Blow] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    """What should not have happened."""

    def __post_init__(self) -> None:
        changes = SWEEP | self.changes | {"name": self.name}
        if "servers" in self.has:
            database = self.world.postgres.url("optuna", None)
            changes |= {"tracking__uri": self.world.tracking.uri, "storage__study": database}
        inside = tiny_sweep(Path(SHARED) / "runs", **changes)
        self.config = tiny_sweep(self.world.runs, **changes)
        """With the folder as this host sees it."""
        self._file = f"{LAN}/{self.name}.yaml"
        (self.world.lan.scratch / f"{self.name}.yaml").write_text(yaml.safe_dump(inside.to_dict()))
        self._num_drivers = 0
        self.attempts_before: dict[str, int] = {}
        self.reached: dict[str, int] = {}
        self._pids: dict[tuple[str, int], int] = {}
        self.start()

    @property
    def folder(self) -> Path:
        return folder_of(self.config)

    def records_uri(self) -> str:
        """Address of its records in MLflow, as this host reaches them.

        Of a file it is a copy: this process keeps what it once read open, under the next one's name.
        """
        if "servers" in self.has:
            return self.world.tracking.store
        copy = self.world.lan.scratch / f"{self.name}-mlflow.db"
        with (
            closing(sqlite3.connect(self.world.runs / "mlflow.db")) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        return f"sqlite:///{copy}"

    @property
    def study(self) -> str:
        """Address of its study, as this host reaches it."""
        return self.world.postgres.local_url("optuna") if "servers" in self.has else ""

    def start(self) -> None:
        """The command is typed; from the second time on with --resume."""
        self._num_drivers += 1
        resume = "--resume" if self._num_drivers > 1 else ""
        log = self.world.lan.scratch / f"{self.name}-{self._num_drivers}.log"
        self.driver: Driver = self.world.drive(f"{self._file} {resume}", log)

    @property
    def logs(self) -> str:
        """All that its commands have said."""
        files = sorted(self.world.lan.scratch.glob(f"{self.name}-*.log"))
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files)

    def steps_made(self) -> int:
        return sum(a.num_steps for found in self.attempts().values() for a in found)

    def attempts(self) -> dict[str, list[Attempt]]:
        """All attempts by trial."""
        found = {}
        for folder in sorted((self.folder / "trials").glob("t*")):
            with suppress(ValueError, TypeError):
                found[folder.name] = attempts(self.folder, folder.name)
        return found

    def count(self) -> None:
        """Takes note of the attempts that there are."""
        self.attempts_before = {trial_id: len(found) for trial_id, found in self.attempts().items()}

    def doings(self) -> Iterator[Doing]:
        """What the processes of running trials are at, as far as they are there."""
        newest: dict[tuple[str, int], tuple[int, str, Attempt]] = {}
        for trial_id, found in self.attempts().items():
            for attempt in found[-1:]:
                written = (self.folder / "trials" / trial_id / "attempts.jsonl").stat().st_mtime_ns
                key = (attempt.host, attempt.pid)
                if key not in newest or written > newest[key][0]:
                    newest[key] = written, trial_id, attempt
        for key, (_, trial_id, attempt) in newest.items():
            pid = self._pid(*key)
            phase = None if pid is None else self._phase(trial_id, attempt)
            if pid is not None and phase is not None:
                yield Doing(trial_id, phase, attempt, pid)

    def _pid(self, host: str, inner: int) -> int | None:
        known = self._pids.get((host, inner))
        if known is None:
            known = self.world.host_pid(host, inner) if self.world.is_up(host) else None
            if known is not None:
                self._pids[host, inner] = known
        return known if known is not None and Path(f"/proc/{known}").exists() else None

    def _phase(self, trial_id: str, attempt: Attempt) -> str | None:
        folder = self.folder / "trials" / trial_id
        if attempt.to_step is None:
            return "loading"
        if any((folder / "checkpoints").glob(".*.part")):
            return "checkpointing"
        if attempt.to_step % EVERY:
            return "training"
        done = f'"step": {attempt.to_step}' in text_of(folder / "reports.jsonl")
        return None if done else "evaluating"

    def aim(self, phase: str) -> Doing:
        """Waits until a running trial is in the phase, or for long enough; then takes any that runs."""
        end = time.monotonic() + _AIM_S
        while self.driver.code is None:
            found = list(self.doings())
            fits = [d for d in found if d.phase == phase]
            if not fits and time.monotonic() > end:
                fits = found
            if fits:
                chosen = self.rng.choice(fits)
                if records(self.folder)[chosen.trial_id].status == "running":
                    return chosen
            assert time.monotonic() < end + _SETTLE_S, f"no trial runs\n{self.logs[-3000:]}"
            time.sleep(0.002)
        raise EndedError

    def let_train(self, seconds: float) -> None:
        """Waits until steps have been made since now, and then for a moment."""
        before, end = self.steps_made(), time.monotonic() + _SETTLE_S
        while self.steps_made() <= before:
            if self.driver.code is not None:
                raise EndedError
            assert time.monotonic() < end, f"no step in {_SETTLE_S:g} s\n{self.logs[-4000:]}"
            time.sleep(0.05)
        time.sleep(seconds)

    def resume(self, blow: Blow | None = None, *, expected: bool = True) -> None:
        """The driver has ended; types --resume, once the cluster is whole."""
        if not expected:
            tail = self.driver.output[-1500:]
            self.troubles.append(f"the driver ended with code {self.driver.code}: {tail}")
        if blow is not None:
            blow.resumed += 1
        self.world.wait_joined()
        self.start()

    def run_to_the_end(self) -> None:
        """Waits for the sweep's end, and resumes it where it does not come in good order."""
        for _ in range(3):
            if self.driver.wait(_END_S) != 0:
                self.resume(expected=False)
            elif "--resume sends them" in self.driver.output:
                # MLflow was away when the sweep ended: the records wait on disk, as it has said.
                self.resume()
            else:
                return
        assert self.driver.wait(_END_S) == 0, self.logs[-4000:]


class EndedError(Exception):
    """The driver has ended before the fault struck."""


def text_of(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
