"""A hundred random faults over twenty small sweeps on a cluster of three machines; all sweeps end right.

As root on Linux, with Debian's postgresql, openssh-server and rsync; in about an hour on two cores:

    python -m pytest tests/chaos -m slow -n 0 -s --timeout 7200

One sweep alone: `-k "sweep[7]"`. With faults of one's choice: DTR_RAY_CHAOS_FAULTS="sweep SIGKILL,...".
After every sweep it prints what the faults so far have cost.
"""

import os
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from chaos.case import CHECKPOINT, PHASES, Blow, Case, EndedError
from chaos.faults import FAULTS
from chaos.hitting import MissedError
from chaos.world import HEAD, WORKERS, World, world
from cluster.machines import missing
from kills import Again, check_accounts, check_mlflow, check_results, count_mlflow, made_again
from postgres import BINARIES
from rich.console import Console
from rich.table import Table
from tiny_sweeps import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TWO = {"resources__workers_per_trial": 2, "resources__max_concurrent": 1, "search__num_trials": 8}
ELASTIC = TWO | {"resources__cpus_per_worker": 2, "resources__min_workers_per_trial": 1}
PLAIN: tuple[dict[str, Any], frozenset[str]] = ({}, frozenset())
SERVERS: tuple[dict[str, Any], frozenset[str]] = ({}, frozenset({"servers"}))
KINDS: list[tuple[dict[str, Any], frozenset[str]]] = [
    SERVERS,
    (TWO, frozenset({"servers", "workers"})),
    PLAIN,
    SERVERS,
    (ELASTIC, frozenset({"servers", "workers", "elastic"})),
    PLAIN,
]
"""Trials of one process or of two workers of Ray Train; MLflow's server and PostgreSQL, or files."""
NUM_SWEEPS, FAULTS_PER_SWEEP, TRIES = 20, 6, 3
_CHOSEN = os.environ.get("DTR_RAY_CHAOS_FAULTS")
_OURS = ("ray::ResourceTrainable", "ray::RayTrainWorker", "ray::TrainController", "ray::Gate", "ray::_Gate")


def plan(seed: int) -> list[str]:
    """The faults of a sweep: all kinds come equally often, as far as sweeps have what they need."""
    counts = dict.fromkeys(FAULTS, 0)
    chosen: list[str] = []
    for number in range(seed + 1):
        has = KINDS[number % len(KINDS)][1]
        chosen = [name for name, fault in FAULTS.items() if fault.needs <= has]
        random.Random(number).shuffle(chosen)
        chosen = sorted(chosen, key=lambda name: counts[name])[:FAULTS_PER_SWEEP]
        for name in chosen:
            counts[name] += 1
    random.Random(seed).shuffle(chosen)
    return chosen if _CHOSEN is None else _CHOSEN.split(",")


@dataclass
class Account:
    """What one sweep's faults have done."""

    name: str
    blows: list[Blow]
    problems: list[str] = field(default_factory=list)
    again: list[list[int]] = field(default_factory=list)
    """For each blow the steps that each process after it has made again."""
    duplicated: int = 0
    lost: int = 0

    def check(self, case: Case) -> None:
        """Looks at everything, whatever it finds."""
        for check in (self._accounts, self._results, self._steps, self._mlflow, self._gone):
            try:
                check(case)
            except Exception as error:  # whatever is wrong is to be told, and the next thing looked at
                text = "".join(traceback.format_exception(error, limit=-3))
                self.problems.append(f"{check.__name__}: {text}")

    def _accounts(self, case: Case) -> None:
        check_accounts(case.config, case.study or None)

    def _results(self, case: Case) -> None:
        check_results(case.config)

    def _steps(self, case: Case) -> None:
        """Each fault has cost at most a checkpoint's interval; one more where it damaged a checkpoint."""
        self.again = [[] for _ in self.blows]
        for again in made_again(case.config):
            befores = [blow.attempts_before.get(again.trial_id, 0) for blow in self.blows]
            which = max((n for n, before in enumerate(befores) if before < again.attempt), default=None)
            assert which is not None or not again.steps, f"{again} before any fault"
            if which is not None:
                self._count(which, again)
        for which, blow in enumerate(self.blows):
            for trial_id, step in blow.reached.items():
                later = case.attempts()[trial_id][blow.attempts_before.get(trial_id, 0) :]
                made = [a for a in later if a.from_step is not None][:1]
                for a in made:
                    self._count(which, Again(trial_id, a.attempt, step - (a.from_step or 0)))

    def _count(self, which: int, again: Again) -> None:
        self.again[which].append(again.steps)
        limit = CHECKPOINT * (2 if "checkpoint" in self.blows[which].fault else 1)
        assert again.steps <= limit, f"{again} after {self.blows[which]}"

    def _mlflow(self, case: Case) -> None:
        uri = case.records_uri()
        self.duplicated, self.lost = count_mlflow(case.config, uri)
        check_mlflow(case.config, uri)

    def _gone(self, case: Case) -> None:
        def left() -> list[str]:
            found = [p for name in (HEAD, *WORKERS) for p in case.world.processes(name, "ray::")]
            return [p.title for p in found if p.title.startswith(_OURS)]

        wait_until(lambda: not left(), 90, f"its processes end: {left()}", poll_s=0.1)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    lacks = missing() + ([] if BINARIES else ["postgresql"])
    if lacks:
        pytest.skip(f"no machines without {', '.join(lacks)} (run as root on Linux)")
    with world(tmp_path_factory.mktemp("chaos")) as made:
        yield made


@pytest.fixture(scope="module")
def accounts() -> list[Account]:
    return []


@pytest.mark.parametrize("seed", range(NUM_SWEEPS), ids=[f"sweep[{n}]" for n in range(NUM_SWEEPS)])
def test_it_ends_right_whatever_happens(machines: World, accounts: list[Account], seed: int) -> None:
    machines.restore()
    changes, has = KINDS[seed % len(KINDS)]
    changes = changes | {"search__seed": seed}
    started = time.monotonic()
    case = Case(machines, f"chaos{seed}", random.Random(seed), changes, has)
    account = Account(case.name, case.blows)
    accounts.append(account)
    say(f"\n{case.name} {sorted(has)}: {', '.join(plan(seed))}")
    try:
        for name in plan(seed):
            strike(case, name)
        case.run_to_the_end()
        account.problems += case.troubles
        account.check(case)
    except BaseException as error:
        account.problems.append("".join(traceback.format_exception(error, limit=-6)))
        raise
    finally:
        case.driver.kill()
        say(f"  {len(account.problems)} problems, {time.monotonic() - started:.0f} s; again {account.again}")
        say("\n".join(account.problems))
        print_table(accounts)
    assert not account.problems, "\n\n".join([*account.problems, case.logs[-6000:]])


def strike(case: Case, name: str) -> None:
    """One fault, and what follows it, until the sweep trains again."""
    fault = FAULTS[name]
    for _ in range(TRIES):
        phase = case.rng.choice(PHASES)
        case.count()
        case.reached = {}
        started = time.monotonic()
        try:
            case.let_train(case.rng.uniform(0, 1))
            note = fault.strike(case, phase)
        except EndedError:
            say(f"  {name}: the sweep has ended before")
            return
        except MissedError as error:
            say(f"  {name}: {error}")
            continue
        struck = time.monotonic()
        blow = Blow(name, phase, note, case.attempts_before, case.reached)
        case.blows.append(blow)
        follow(case, blow, ends=fault.ends_driver)
        blow.seconds = time.monotonic() - struck
        say(f"  {name}: {blow.note}; {struck - started:.0f} s, then {blow.seconds:.0f} s")
        return


def follow(case: Case, blow: Blow, *, ends: bool) -> None:
    """Resumes the sweep where its process has ended, and waits until it trains."""
    try:
        if ends:
            case.resume(blow)
        case.let_train(0)
    except EndedError:
        if case.driver.code:
            case.resume(blow, expected=False)
            case.let_train(0)


def say(text: str) -> None:
    print(text, flush=True)


def print_table(found: list[Account]) -> None:
    blows = [blow for account in found for blow in account.blows]
    table = Table(title=f"{len(blows)} faults in {len(found)} sweeps")
    heads = ("fault", "injected", "ended right", "resumed by hand", "steps again, most and all")
    for heading in (*heads, "runs duplicated", "records lost or doubled", "seconds to train again"):
        table.add_column(heading)
    for name in dict.fromkeys(blow.fault for blow in blows):
        hit = [account for account in found if any(blow.fault == name for blow in account.blows)]
        mine = [(a, n, b) for a in hit for n, b in enumerate(a.blows) if b.fault == name]
        again = [s for a, n, _ in mine for s in (a.again[n] if a.again else [])]
        table.add_row(
            name,
            str(len(mine)),
            f"{sum(not a.problems for a, _, _ in mine)} of {len(mine)}",
            str(sum(b.resumed for *_, b in mine)),
            f"{max(again, default=0)}, {sum(again)}",
            str(sum(a.duplicated for a in hit)),
            str(sum(a.lost for a in hit)),
            f"{sum(b.seconds for *_, b in mine) / len(mine):.0f}",
        )
    Console(width=140).print(table)
