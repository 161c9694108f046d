"""How a trial's processes have died, in a sentence: hung, out of memory, with their machine, or otherwise."""

from pathlib import Path

from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from dtr_ray.search.state import SweepState
from dtr_ray.service import processes
from dtr_ray.service.draining import MachineLeftError
from dtr_ray.service.trial import reason_of


class Deaths:
    """What the watchdog, Ray and the machines' kernels know of it."""

    def __init__(self, state: SweepState, hung: dict[str, str]) -> None:
        """`hung` has what the watchdog ended, see there."""
        self._state, self._hung = state, hung
        self.last: dict[str, str] = {}
        """How the last process of each trial has died, by its id."""
        self.moved: set[str] = set()
        """Trials whose last process has left, or died with, a machine that was to go: no failure."""

    def note(self, trial_id: str, error_file: str | None) -> str:
        """Finds out how the trial's process has died; `error_file` is Tune's, with the error that it saw."""
        reason = self._hung.pop(trial_id, None)
        self.moved.discard(trial_id)
        if reason is None:
            reason = self._by_error(trial_id, error_file)
        self.last[trial_id] = reason
        return reason

    def forget(self, trial_id: str) -> None:
        """The trial has ended."""
        self.last.pop(trial_id, None)
        processes.dismiss(self._folder(trial_id))

    def _by_error(self, trial_id: str, error_file: str | None) -> str:
        if error_file is None or not Path(error_file).exists():
            return "Ray does not say of what"
        error = cloudpickle.loads(Path(error_file).read_bytes())
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RayActorError) and cause.preempted:
            self.moved.add(trial_id)
            return (
                str(cause) if isinstance(cause, MachineLeftError) else "its machine was to go, and has gone"
            )
        reason = reason_of(cause)
        killed = sum(map(processes.kills_since, processes.enlisted(self._folder(trial_id))))
        if killed and isinstance(cause, RayError):
            return f"out of memory: the kernel of its machine has ended {killed} processes for want of it"
        return _cause_of_death(cause) if isinstance(cause, ActorDiedError) else reason

    def _folder(self, trial_id: str) -> Path:
        return self._state.folder.resolve() / "trials" / trial_id


def _cause_of_death(error: ActorDiedError) -> str:
    """Ray's sentence on it, without what it lists before."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    # The first says that it was unexpected.
    said = " ".join(lines[1:2] or lines)
    return f"it ended unexpectedly: {said.partition('Some common causes')[0].strip():.300}"
