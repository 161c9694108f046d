"""The watchdog: ends a sweep that makes no progress, so that it can never hang."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtr_ray.search.state import SweepState
from dtr_ray.service.attempts import read_heartbeat

# After the stall time-out Tune has this long to end by itself.
_GRACE_S = 60.0


@contextmanager
def watchdog(state: SweepState, stall_timeout_s: float, grace_s: float = _GRACE_S) -> Iterator[None]:
    """Ends the sweep when no trial gives a sign of life for `stall_timeout_s` seconds.

    In good order if Tune still can; else it ends this process after `grace_s` more, with exit code 1.
    """
    done = threading.Event()

    def watch() -> None:
        last, since = _signs(state), time.monotonic()
        while not done.wait(min(5.0, stall_timeout_s / 4)):
            now = _signs(state)
            if now != last:
                last, since = now, time.monotonic()
            idle_s = time.monotonic() - since
            if idle_s > stall_timeout_s:
                state.end(_reason(state, idle_s, stall_timeout_s))
            if idle_s > stall_timeout_s + grace_s:
                faulthandler.dump_traceback(all_threads=True)
                print(f"error: {state.ending}; --resume goes on with it", file=sys.stderr, flush=True)
                # Ray's processes on this machine die with their parent.
                os._exit(1)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _signs(state: SweepState) -> tuple[Any, ...]:
    """Something that changes whenever any trial gives a sign of life."""
    trials = [t.trial_id for t in list(state.trials.values()) if t.status == "running"]
    beats = tuple(read_heartbeat(state.trial_folder(t)).get("time", 0.0) for t in trials)
    return len(state.trials), tuple(trials), beats


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
