"""What the doctor has each machine of a cluster look at: itself, the shared folder, weights and data.

`look` runs on the machine, as a task of Ray or, where there is no cluster, in the doctor's own process. It
tells plain facts; the doctor, which sees all machines side by side, says what is wrong.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dtr_ray
from dtr_ray.service.findings import in_a_line, within
from dtr_ray.service.store_checks import DRIVER_TOKEN, write_there
from dtr_ray.storage.address import is_url

# The packages that a checkpoint, a message or a figure depends on: all machines are to have the same.
SHARED_PACKAGES = ("ray", "torch", "torchvision", "diffusers", "numpy", "optuna")
_SHM = Path("/dev/shm")  # noqa: S108 - where Ray's object store is
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# A file server may show a new file to other machines seconds later.
_SEEN_WITHIN_S = 5.0

# In a process of its own: a driver that hangs takes it along, and Ray hides GPUs from tasks without any.
_GPU_PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "count": 0, "names": [], "unsupported": [], "nccl": None, "fault": ""}
try:
    if found["cuda"]:
        torch.cuda.init()
    found["count"] = torch.cuda.device_count()
    built = [arch.partition("_") for arch in torch.cuda.get_arch_list()]
    for n in range(found["count"]):
        found["names"].append(torch.cuda.get_device_name(n))
        major, minor = torch.cuda.get_device_capability(n)
        def runs(kind, number):
            own = int("".join(c for c in number if c.isdigit()))
            return own <= 10 * major + minor and (kind == "compute" or own // 10 == major)
        if built and not any(runs(kind, number) for kind, _, number in built):
            found["unsupported"].append(f"{found['names'][n]} (sm_{major}{minor})")
    if found["cuda"] and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception as error:
    found["fault"] = f"{error}".strip().partition("\\n")[0]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Order:
    """What a machine is to look at."""

    name: str
    """Its file in the probe folder."""
    working_folder: str
    """Where relative paths of the configuration begin, as a sweep's trials take them."""
    probe: str
    """Folder in the sweep's output that the driver has made (an address, if in a store); "": it could not."""
    token: str
    """What the driver's file in there holds."""
    num_gpus: float
    """What the cluster says that it has."""
    data: Mapping[str, Any] | None
    """The `data` section, of a machine that runs trials."""
    weights: tuple[Mapping[str, Any], ...]
    limit_s: float


@dataclass(frozen=True)
class Answer:
    """What a machine has found; a part is in `facts` or, where it could not be looked at, in `errors`."""

    facts: dict[str, Any]
    errors: dict[str, str]


def look_there(order: Order) -> Answer:
    """`look` in a process that Ray has started, from the folder in which the doctor was."""
    if Path(order.working_folder).is_dir():
        os.chdir(order.working_folder)
    return look(order)


def look(order: Order) -> Answer:
    """Looks at everything, all of it within the time limit."""
    facts, errors = {}, {}
    end = time.monotonic() + order.limit_s
    for name, part in _PARTS.items():
        try:
            facts[name] = within(max(0.1, end - time.monotonic()), lambda part=part: part(order))  # type: ignore[misc]
        except Exception as error:  # whatever it is, it is what the doctor is there to tell
            errors[name] = in_a_line(error)
    return Answer(facts, errors)


def now() -> float:
    """The machine's clock, Unix time in seconds."""
    return time.time()


def code_digest(package: Path) -> str:
    """Ten hex digits of all Python files in a package: the same code has the same."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def _software(order: Order) -> dict[str, str]:
    found = {"python": platform.python_version(), "dtr_ray": dtr_ray.__version__}
    for name in SHARED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"code": code_digest(Path(dtr_ray.__file__).parent)}


def _gpu(order: Order) -> dict[str, Any]:
    """The driver's version, and what PyTorch sees; it is not asked where nothing hints at a GPU."""
    text = _DRIVER_FILE.read_text(encoding="utf-8") if _DRIVER_FILE.exists() else ""
    driver = re.search(r"\b\d{3,}\.[\d.]+\b", text)
    present = driver is not None or any(Path("/dev").glob("nvidia[0-9]*")) or order.num_gpus > 0
    found: dict[str, Any] = {"driver": driver and driver[0], "present": present}
    if not found["present"]:
        return found | {"count": 0}
    hidden = {"CUDA_VISIBLE_DEVICES"} if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else set()
    answer = subprocess.run(
        [sys.executable, "-c", _GPU_PROBE],
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
        timeout=order.limit_s,
        check=False,
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise RuntimeError(f"PyTorch does not start: {lines[-1]}")
    return {**found, **json.loads(answer.stdout.splitlines()[-1])}


def _storage(order: Order) -> str:
    """Writes this machine's file and reads the driver's; returns what is wrong, or ""."""
    if is_url(order.probe):
        return write_there(order.probe, order.name, order.token)
    probe = Path(order.probe)
    if not order.probe:
        return ""
    end = time.monotonic() + min(_SEEN_WITHIN_S, order.limit_s / 2)
    while not (probe / DRIVER_TOKEN).is_file():
        if time.monotonic() > end:
            return f"does not see {probe.parent}, or not what was just written there"
        time.sleep(0.1)
    found = (probe / DRIVER_TOKEN).read_text(encoding="utf-8")
    if found != order.token:
        return f"reads something else in {probe.parent} than was written there"
    try:
        with (probe / order.name).open("w", encoding="utf-8") as file:
            file.write(f"{order.token} {order.name}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write in {probe.parent}: {error}"
    return ""


def _space(order: Order) -> dict[str, tuple[str, int, int]]:
    """Path, free and total bytes of the cache, the folder of Ray's session, and shared memory."""
    from dtr_ray.cache import cache_dir

    session = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    found = {}
    for name, path in (("cache", cache_dir()), ("temp", session), ("shm", _SHM)):
        if name == "shm" and not path.is_dir():
            continue
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        usage = shutil.disk_usage(existing)
        found[name] = (str(path), usage.free, usage.total)
    return found


def _open_files(order: Order) -> int:
    """How many files a process may have open, its own raise included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if resource.RLIM_INFINITY in (soft, hard) else int(soft)


def _weights(order: Order) -> list[tuple[str, str, str]]:
    """(name, `here`, `later` or `missing`, why or where) of the pretrained weights; fetches none."""
    from dtr_ray.weights.finding import Weights, ask, find
    from dtr_ray.weights.offline import offline

    found = []
    for one in order.weights:
        weights = Weights(**one)
        try:
            with offline():
                find(weights, lambda done, total: None)
        except ValueError:
            try:
                found.append((str(weights), "later", ask(weights)))
            except ValueError as error:
                found.append((str(weights), "missing", str(error)))
        else:
            found.append((str(weights), "here", ""))
    return found


def _data(order: Order) -> str:
    """What is wrong with the images as this machine sees them, or ""."""
    if order.data is None:
        return ""
    from dtr_ray.config import DataConfig
    from dtr_ray.data import check_data

    config = DataConfig.from_dict(dict(order.data))
    if config.path is not None and not Path(config.path).expanduser().is_dir():
        return f"data.path {config.path} is no folder (seen from {Path.cwd()})"
    try:
        check_data(config)
    except ValueError as error:
        return str(error)
    return ""


_PARTS: dict[str, Callable[[Order], Any]] = {
    "software": _software,
    "storage": _storage,
    "space": _space,
    "open files": _open_files,
    "gpu": _gpu,
    "data": _data,
    "weights": _weights,
}
