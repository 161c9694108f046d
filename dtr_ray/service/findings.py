"""What the doctor finds, and the time limit that keeps each of its checks from hanging."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from dtr_ray.search.database import without_password

Level = Literal["ok", "warning", "fail"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    text: str
    """What was found."""
    mend: str = ""
    """What to do about it, in one sentence; empty where all is well."""


def ok(text: str) -> Finding:
    """All is well."""
    return Finding("ok", text)


def warning(text: str, mend: str) -> Finding:
    """A sweep runs, but not as well as it could, or not for ever."""
    return Finding("warning", text, mend)


def fail(text: str, mend: str) -> Finding:
    """A sweep does not run, or goes wrong."""
    return Finding("fail", text, mend)


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; raises TimeoutError where it takes longer than `limit_s` seconds.

    It runs in a thread, which then stays behind: nothing else ends a call that hangs in the kernel.
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised again where the caller waits
            errors.append(error)

    thread = threading.Thread(target=run, name="check", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        if isinstance(errors[0], Exception):
            raise errors[0]
        # Ray ends its process by SystemExit where it cannot join a cluster.
        raise RuntimeError(f"it wanted to end the process: {errors[0]!r}") from errors[0]
    if not found:
        raise TimeoutError(f"did not end within {limit_s:g} s")
    return found[0]


def in_a_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters, without a password in an address."""
    text = " ".join(without_password(str(error)).split())[:300]
    name = type(error).__name__
    return text if isinstance(error, ValueError | TimeoutError) and text else f"{name}: {text}".rstrip(": ")
