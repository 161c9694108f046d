"""Provenance: what tells one sweep from another, and what its results depend on besides the configuration."""

import importlib.metadata
import platform
import subprocess
import uuid
from pathlib import Path

from dtr_ray.disk import write_durably

_PACKAGES = ("dtr_ray", "torch", "ray", "optuna", "diffusers", "mlflow")


def sweep_identity(folder: Path) -> str:
    """What tells this sweep's records from those of any other: made once, and kept in its folder."""
    path = folder / "identity"
    if not path.exists():
        write_durably(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()


def versions() -> dict[str, str]:
    """Tags that say what code ran where: versions of packages, git commit, host."""
    found = {}
    for name in _PACKAGES:
        try:
            found[f"env.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit:
        found["mlflow.source.git.commit"] = commit
    return {**found, "env.python": platform.python_version(), "env.host": platform.node()}


def environment() -> dict[str, str]:
    """Tags of one worker's process: versions, host and device."""
    import torch

    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(torch.cuda.current_device())
    return {
        "env.python": platform.python_version(),
        "env.torch": torch.__version__,
        "env.host": platform.node(),
        "env.device": device,
    }


def _git_commit() -> str | None:
    """The commit that this code is at; None where it is no part of a checkout, be it installed inside one."""
    here = Path(__file__)
    tracked = ["git", "ls-files", "--error-unmatch", here.name]
    try:
        if subprocess.run(tracked, cwd=here.parent, capture_output=True, check=False).returncode:
            return None
        head = ["git", "rev-parse", "HEAD"]
        answer = subprocess.run(head, cwd=here.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
