"""The watchdog: ends what hangs, a trial's processes or the whole sweep, so that no sweep waits for ever.

Time is measured here, on a clock that never jumps, from the moment at which a new sign of life was seen.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtr_ray import disk
from dtr_ray.search.state import SweepState
from dtr_ray.service import processes
from dtr_ray.service.attempts import read_attempts, read_heartbeat
from dtr_ray.service.claims import waits_for_others
from dtr_ray.service.processes import Process

log = logging.getLogger(__name__)

# After the stall time-out Tune has this long to end by itself.
_GRACE_S = 60.0
# Where a trial's workers were ended and nothing follows, it is the process that looks after them that hangs.
_FOLLOW_S = 60.0
_PHASES = ("loading", "training", "checkpointing", "evaluating")


@contextmanager
def watchdog(state: SweepState, hung: dict[str, str], grace_s: float = _GRACE_S) -> Iterator[None]:
    """Ends a trial's processes where it hangs, and the sweep where no trial gives a sign of life.

    Args:
        state: of the sweep.
        hung: gets the reason why a trial's processes are ended, by its id, before they are.
        grace_s: the sweep has so long to end in good order; then this process ends, with exit code 1.
    """
    done = threading.Event()
    failures = state.config.failures
    watch = TrialWatch(state, hung)

    def look() -> None:
        last, since = _signs(state), time.monotonic()
        while not done.wait(min(5.0, failures.stall_timeout_s / 4, failures.hang_timeout_s / 4)):
            now = _signs(state)
            if disk.is_waiting() or state.is_cut_off():
                # All trials wait for this process then, or for the store.
                now = ()
                watch.forget()
            elif _is_waiting_for_others(state):
                now = ()
            if now != last or not now:
                last, since = now, time.monotonic()
            idle_s = time.monotonic() - since
            if idle_s > failures.stall_timeout_s:
                state.end(_reason(state, idle_s, failures.stall_timeout_s))
            if idle_s > failures.stall_timeout_s + grace_s:
                faulthandler.dump_traceback(all_threads=True)
                print(f"error: {state.ending}; --resume goes on with it", file=sys.stderr, flush=True)
                # Ray's processes on this machine die with their parent.
                os._exit(1)
            watch.look(time.monotonic())

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclass
class _Seen:
    """What was seen of a running trial."""

    mark: tuple[int, int]
    """Attempt and count of its newest sign of life."""
    since: float
    """When it came, on this process's own clock."""
    left: list[Process] = field(default_factory=list)
    """What looks after those of its processes that were ended since."""


@dataclass
class _Experience:
    """The longest times from one sign of life to the next, in seconds, by phase."""

    of_trials: dict[tuple[str, str], float] = field(default_factory=dict)
    of_hosts: dict[tuple[str, str], float] = field(default_factory=dict)

    def learn(self, trial_id: str, beat: dict[str, Any]) -> None:
        for phase, seconds in beat.get("longest_s", {}).items():
            for known, key in ((self.of_trials, trial_id), (self.of_hosts, beat["host"])):
                known[key, phase] = max(seconds, known.get((key, phase), 0.0))

    def longest_s(self, trial_id: str, host: str, phase: str) -> float | None:
        """Of the trial or any other on the machine; None where nobody has been through the phase."""
        # Other machines may have to fetch and compute what this one had.
        own, others = self.of_trials.get((trial_id, phase)), self.of_hosts.get((host, phase))
        return max((s for s in (own, others) if s is not None), default=None)


class TrialWatch:
    """Finds trials that hang while others go on, and ends their processes: Tune starts them again."""

    def __init__(
        self,
        state: SweepState,
        hung: dict[str, str],
        enlisted: Callable[[Path], list[Process]] = processes.enlisted,
        end: Callable[[list[Process]], list[Process]] = processes.end,
    ) -> None:
        """`hung` as for `watchdog`; `enlisted` finds a trial's processes by its folder, `end` ends them."""
        self._state, self._hung = state, hung
        self._enlisted, self._end = enlisted, end
        self._seen: dict[str, _Seen] = {}
        self._full: set[str] = set()
        self._experience = _Experience()

    def look(self, now: float) -> None:
        """Looks at every running trial; `now` is of `time.monotonic`."""
        try:
            self._look(now)
        except Exception as error:  # Ray's own, of many kinds, where its head is away for a while
            log.warning("the watchdog cannot look at the trials now: %s", error)

    def _look(self, now: float) -> None:
        running = _running(self._state)
        for gone in self._seen.keys() - set(running):
            del self._seen[gone]
        for trial_id in running:
            beat = read_heartbeat(self._state.trial_folder(trial_id))
            # Not of a version that did not tell it, nor of one that is not started yet.
            if "count" in beat:
                self._look_at(trial_id, beat, now)

    def forget(self) -> None:
        """Begins anew to measure how long trials are silent."""
        self._seen.clear()

    def _look_at(self, trial_id: str, beat: dict[str, Any], now: float) -> None:
        self._experience.learn(trial_id, beat)
        self._tell_full(trial_id, beat["phase"] == disk.WAITING)
        mark, seen = (beat["attempt"], beat["count"]), self._seen.get(trial_id)
        if seen is None or seen.mark != mark:
            self._seen[trial_id] = _Seen(mark, now)
            return
        idle_s, (limit_s, why) = now - seen.since, self._limit(trial_id, beat)
        if seen.left and idle_s > _FOLLOW_S:
            ended = self._end(seen.left)
            self._seen[trial_id] = _Seen(mark, now)
            if ended:
                log.warning("%s: %d more processes were ended", trial_id, len(ended))
        elif not seen.left and idle_s > limit_s:
            seen.since = now
            doing = _doing(self._state, trial_id, beat)
            self._end_trial(trial_id, seen, f"no sign of life for {idle_s:.0f} s while {doing} ({why})")

    def _tell_full(self, trial_id: str, is_full: bool) -> None:
        """Says that a trial waits for room: its own words are in a log elsewhere."""
        if is_full and trial_id not in self._full:
            folder = self._state.folder
            log.warning(
                "%s waits for room on the disk of %s (%.3g GB free): free space there, it goes on by itself",
                *(trial_id, folder, disk.free_bytes(folder)[0] / 1e9),
            )
        elif not is_full and trial_id in self._full:
            log.warning("%s goes on: there is room again", trial_id)
        (self._full.add if is_full else self._full.discard)(trial_id)

    def _end_trial(self, trial_id: str, seen: _Seen, reason: str) -> None:
        found = self._enlisted(self._state.folder.resolve() / "trials" / trial_id)
        self._hung[trial_id] = reason
        ended = self._end([one for one in found if one.role != "trial"])
        if ended:
            seen.left = [one for one in found if one.role == "trial"]
            log.warning("%s: %s: its processes were ended", trial_id, reason)
        else:
            # It has died, or its machine has, and waits for its next process.
            del self._hung[trial_id]

    def _limit(self, trial_id: str, beat: dict[str, Any]) -> tuple[float, str]:
        """How long it may be silent in its phase, and why that long."""
        failures = self._state.config.failures
        longest_s = self._experience.longest_s(trial_id, beat["host"], beat["phase"])
        if longest_s is None or beat["phase"] not in _PHASES:
            return failures.stall_timeout_s, "failures.stall_timeout_s"
        limit_s = max(failures.hang_timeout_s, failures.hang_factor * longest_s)
        # As long as a trial that is alone may be.
        return min(limit_s, failures.stall_timeout_s), f"the longest before took {longest_s:.3g} s"


def _doing(state: SweepState, trial_id: str, beat: dict[str, Any]) -> str:
    """`training, after step 57`."""
    made = [attempt.to_step for attempt in read_attempts(state.trial_folder(trial_id))[-1:]]
    step = beat["step"] if not made or made[0] is None else max(beat["step"], made[0])
    return f"{beat['phase']}, after step {step}"


def _running(state: SweepState) -> list[str]:
    """Copied first: another thread adds to them."""
    return [trial.trial_id for trial in list(state.trials.values()) if trial.status == "running"]


def _signs(state: SweepState) -> tuple[Any, ...]:
    """Something that changes whenever any trial gives a sign of life."""
    trials = _running(state)
    beats = [read_heartbeat(state.trial_folder(t)) for t in trials]
    marks = tuple((beat.get("attempt"), beat.get("count")) for beat in beats)
    return len(state.trials), tuple(trials), marks


def _is_waiting_for_others(state: SweepState) -> bool:
    """Whether the trials of other sweeps are in the way of all of this one's."""
    begun = any(read_heartbeat(state.trial_folder(trial_id)) for trial_id in _running(state))
    return waits_for_others(state.config, begun=begun)


def _reason(state: SweepState, idle_s: float, stall_timeout_s: float) -> str:
    last = []
    for trial in state.running:
        beat = read_heartbeat(state.trial_folder(trial.trial_id))
        seen = f"last seen {beat['phase']} at step {beat['step']}" if beat else "not started by Ray"
        last.append(f"{trial.trial_id} {seen}")
    return (
        f"no trial has made a step for {idle_s:.0f} s (failures.stall_timeout_s is {stall_timeout_s:g}): "
        + (", ".join(last) or "none is running")
    )
