"""Reading NumPy's files, which hold arrays alone: a pickle in one is refused, and so is what is damaged."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def load_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """The array of a .npy file; raises ValueError, which names the file, where it holds none."""
    try:
        found: Any = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except _ERRORS as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {_reason(error)}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{path} cannot be read as a .npy file: it holds several arrays")
    return found


def load_arrays(path: Path, names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Arrays of a .npz file by their names; raises ValueError, which names the file, where it lacks one."""
    try:
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("it holds a single array")
        with found:
            return tuple(found[name] for name in names)
    except _ERRORS as error:
        raise ValueError(f"{path} cannot be read as a .npz file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """NumPy takes bytes that it does not know for a pickle, and says how to run it."""
    text = " ".join(str(error).split())
    return "it is no array of NumPy's" if "pickle" in text else text
