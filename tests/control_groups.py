"""Memory control groups (version 1), for processes that the kernel is to end for want of memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_sweeps import wait_until

GROUPS = Path("/sys/fs/cgroup/memory")


def can_limit() -> bool:
    """Whether this process may make one."""
    return os.access(GROUPS, os.W_OK)


@contextmanager
def little_memory(limit_bytes: int) -> Iterator[Path]:
    """A control group of so much memory; a process goes in by its number in `cgroup.procs`."""
    folder = GROUPS / f"dtr-ray-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield folder
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            (GROUPS / "cgroup.procs").write_text(pid)
        wait_until(lambda: _removed(folder), 60.0, "the control group is empty")


def _removed(folder: Path) -> bool:
    """A process that has ended, but of which nobody has taken note, keeps its group."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
