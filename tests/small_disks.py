"""Real file systems that are small enough to be filled."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Makes the folder, a file system of that size (`4m`) while the block runs.

    Skips the test where this process may not mount one.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    try:
        yield folder
    finally:
        # Lazily: a process that was killed may not be gone yet.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all room of the file system, and what is given back meanwhile; returns the file to remove."""
    ballast, size = folder / "ballast", 0
    with ballast.open("wb") as file:
        for _ in range(20):
            free = shutil.disk_usage(folder).free
            if free:
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), size, free)
                    size += free
    return ballast
