"""Small C libraries that stand between a process and the kernel, by LD_PRELOAD."""

import shutil
import struct
import subprocess
from pathlib import Path


def can_build() -> bool:
    """Whether there is a compiler."""
    return shutil.which("gcc") is not None


def build(name: str, folder: Path) -> Path:
    """Compiles tests/NAME.c; returns the library in the folder."""
    source, library = Path(__file__).with_name(f"{name}.c"), folder / f"{name}.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def set_clock(file: Path, seconds: int) -> None:
    """Sets the wall clock of processes with clock.so and this CLOCK_FILE so many seconds ahead."""
    file.touch()
    # In place: processes have it mapped.
    with file.open("r+b") as content:
        content.write(struct.pack("q", seconds))
