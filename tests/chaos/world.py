"""A small world for sweeps: a head, two workers and a server, each a machine that keeps itself going.

As an operator would have it: an init system starts Ray's node again wherever it has ended, and a machine
that is switched on joins by itself. Ray's patience is shortened through its environment, as a user may do,
so that a machine that is gone is noticed in some 10 s instead of a minute.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chaos.driver import Driver
from chaos.servers import Tracking
from cluster.machines import Lan, lan
from postgres import PASSWORD, Postgres
from power import PowerLog
from preloaded import build, can_build, set_clock
from small_disks import small_disk
from tiny_sweeps import wait_until

ROOT = Path(__file__).parents[2]
HEAD, WORKERS, SERVER = "head", ("one", "two"), "server"
RAY = "10.77.0.2:6379"
SHARED = "/mnt/shared"
"""The machines' common folder: a disk of its own, which can be full, and lose power."""
LAN = "/mnt/lan"
_DISK_MB = 600
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "DTR_RAY_CACHE": f"{LAN}/cache",
    "DTR_RAY_STUDY_PASSWORD": PASSWORD,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The head gives a machine up that has not answered for some 10 s, and a machine its head after 8 s.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "RAY_worker_niceness": "0",
    # Two cores have better to do.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_raylet_death_check_interval_milliseconds": "500",
    # Two machines on one small host: its memory is not theirs.
    "RAY_memory_monitor_refresh_ms": "0",
}
_NODE = "ray start --block --object-store-memory=100000000 --disable-usage-stats --node-ip-address={address}"
_HEAD = " --head --port=6379 --num-cpus=0"
_WORKER = f" --address={RAY} --num-cpus=2"


@dataclass(frozen=True)
class Process:
    """One process of a machine, as this host counts."""

    pid: int
    title: str
    parent: int


class World:
    """All machines, and what runs on them."""

    def __init__(self, network: Lan, postgres: Postgres, tracking: Tracking, power: PowerLog | None) -> None:
        self.lan, self.postgres, self.tracking, self.power = network, postgres, tracking, power
        self.environment = dict(ENVIRONMENT)
        if power is not None:
            place = f"{LAN}/power"
            build("clock", network.scratch / "power")
            self.environment |= {
                "LD_PRELOAD": f"{place}/power.so:{place}/clock.so",
                "POWER_FOLDER": f"{SHARED}/runs",
                "POWER_LOG": place,
                # Their timers follow the wall clock: one that was ahead stops the head's health checks for as
                # long as that, and then no machine that is gone is given up.
                "CLOCK_SPARES": "gcs_server,raylet",
            }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._cut: set[str] = set()
        self.postgres.make_database("optuna")

    @property
    def runs(self) -> Path:
        """The folder for sweeps, which the machines have as SHARED/runs."""
        return self.lan.shared / "runs"

    def restore(self) -> None:
        """Everything is up and joined to Ray, and there are no sweeps."""
        for left in (*self.runs.iterdir(), *self.lan.shared.glob("ballast*")):
            target = self.lan.scratch / "sweeps" / left.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(left, target) if left.parent == self.runs else left.unlink()
        if self.power is not None:
            self.power.book()
        for name in tuple(self._cut):
            self.mend(name)
        for name in (HEAD, *WORKERS):
            if not self.is_up(name):
                self.power_on(name)
            elif name not in self._nodes:
                self._keep(name)
        if not self.postgres.running:
            self.postgres.start()
        self.tracking.restore()
        self.wait_joined()

    def is_up(self, name: str) -> bool:
        return Path(f"/proc/{self.lan.machines[name].pid}").exists()

    def power_off(self, name: str) -> None:
        self.lan.machines[name].power_off()
        self._nodes.pop(name).wait()

    def power_on(self, name: str) -> None:
        self.lan.power_on(name)
        self._keep(name)

    def cut(self, name: str) -> None:
        """Pulls the machine's network cable."""
        self._cut.add(name)
        self.lan.switch.run(f"ip link set {name} down")

    def mend(self, name: str) -> None:
        self.lan.switch.run(f"ip link set {name} up")
        self._cut.discard(name)

    def set_clock(self, name: str, seconds: int) -> None:
        """The machine's wall clock is so many seconds ahead from now on."""
        set_clock(self.lan.scratch / f"clock-{name}", seconds)

    def settings(self, name: str) -> str:
        """The environment of Ray and of sweeps there, for `env`."""
        environment = self.environment | {"CLOCK_FILE": f"{LAN}/clock-{name}"}
        return " ".join(f"{key}={value}" for key, value in environment.items())

    def _keep(self, name: str) -> None:
        """What the machine's init system does: its Ray is started again whenever it has ended."""
        self.set_clock(name, 0)
        settings = self.settings(name)
        start = _NODE.format(address=self.lan.addresses[name]) + (_HEAD if name == HEAD else _WORKER)
        with (self.lan.scratch / f"ray-{name}.log").open("ab") as log:
            self._nodes[name] = subprocess.Popen(
                self.lan.machines[name].command(f"while true; do env {settings} {start}; sleep 0.5; done"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> dict[str, str]:
        """Ray's ids of the nodes that it takes to be alive, by machine; empty where it does not answer."""
        head = self.lan.machines[HEAD]
        page = "http://127.0.0.1:8265/api/v0/nodes?limit=1000&timeout=5"
        enter = ["nsenter", f"--target={head.pid}", "--net"]
        done = subprocess.run(
            [*enter, "curl", "-s", "-m", "6", page], capture_output=True, text=True, check=False
        )
        names = {address: name for name, address in self.lan.addresses.items()}
        with suppress(ValueError, KeyError, TypeError):
            nodes = json.loads(done.stdout)["data"]["result"]["result"]
            return {names[n["node_ip"]]: n["node_id"] for n in nodes if n["state"] == "ALIVE"}
        return {}

    def wait_joined(self, seconds: float = 120) -> None:
        """Until Ray has all machines; one that is gone but not yet given up does not count."""
        wait_until(self._is_whole, seconds, "all machines join Ray", poll_s=0.1)

    def _is_whole(self) -> bool:
        raylets = {name: self.processes(name, "raylet/raylet") for name in (HEAD, *WORKERS)}
        ids = self.alive()
        return set(ids) == {HEAD, *WORKERS} and all(
            any(ids[name] in _words(process.pid) for process in found) for name, found in raylets.items()
        )

    def processes(self, name: str, title: str = "") -> list[Process]:
        """The machine's processes whose command line has `title` in it."""
        found = []
        space = _namespace(self.lan.machines[name].pid)
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pid = int(folder.name)
                if space is None or _namespace(pid) != space:
                    continue
                words = _words(pid)
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if words and title in words:
                    found.append(Process(pid, words, parent))
        return found

    def host_pid(self, name: str, inner: int) -> int | None:
        """This host's number of the process that the machine knows as `inner`."""
        for process in self.processes(name):
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                if int(numbers[-1]) == inner:
                    return process.pid
        return None

    def drive(self, words: str, log: Path) -> Driver:
        settings = f"{self.settings(HEAD)} RAY_ADDRESS={RAY}"
        return Driver(self.lan.machines[HEAD], words, log, settings)

    def ray(self, words: str) -> str:
        """What a command of Ray's, typed on the head, prints."""
        return self.lan.machines[HEAD].run(f"env {self.settings(HEAD)} ray {words}")


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def world(scratch: Path) -> Iterator[World]:
    """A world for the time of a test; nothing of it stays."""
    with (
        small_disk(scratch / "shared", f"{_DISK_MB}m"),
        lan(scratch, ["switch", HEAD, *WORKERS, SERVER]) as network,
    ):
        server = network.machines[SERVER]
        enter = ["nsenter", f"--target={server.pid}", "--net"]
        postgres = Postgres(enter, network.addresses[SERVER])
        tracking = None
        try:
            postgres.start()
            tracking = Tracking(scratch / "mlflow", postgres, enter, network.addresses[SERVER])
            tracking.start()
            (network.shared / "runs").mkdir()
            (scratch / "power").mkdir()
            power = PowerLog(network.shared / "runs", scratch / "power") if can_build() else None
            made = World(network, postgres, tracking, power)
            made.restore()
            yield made
        finally:
            if tracking is not None:
                tracking.kill()
            postgres.remove()
