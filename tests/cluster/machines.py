"""Machines made of namespaces: own network, processes, host name, /tmp and home, and an SSH server."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
TOOLS = ("unshare", "nsenter", "ip", "mount", "ssh", "ssh-keygen", "rsync")
USER, HOME = "ray", "/home/ray"
"""The one user on every machine: user 0 under another name, with a home of its own."""
_OWN = ("/tmp", "/run", "/home", "/dev/shm")
"""What a machine shares with no other: empty when it boots."""
_NAMESPACES = ("--pid", "--mount", "--net", "--uts", "--ipc")
_START_S = 20.0


def missing() -> list[str]:
    """What this host lacks to make machines; empty where it can."""
    lacks = [name for name in TOOLS if shutil.which(name) is None]
    if SSHD is None:
        lacks.append("sshd (Debian: openssh-server)")
    if not lacks and subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], check=False).returncode:
        lacks.append("the right to make namespaces")
    return lacks


class Machine:
    """A shell inside one machine."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], pid: int) -> None:
        self.name = name
        self._process = process
        self.pid = pid
        """Of the machine's first process, as this host counts them."""

    def command(self, line: str) -> list[str]:
        """The host's command that runs a line of shell in the machine, as its user, from its home."""
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES]
        clean = ["env", "-i", f"HOME={HOME}", f"USER={USER}", "LANG=C.UTF-8", f"PATH={_path()}"]
        return [*enter, *clean, "bash", "-c", f"cd ~ && {line}"]

    def run(self, line: str, *, timeout: float = 60, check: bool = True) -> str:
        """What the line prints, both streams; raises AssertionError with it where the line fails."""
        done = subprocess.run(
            self.command(line),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{self.name}: {line}\n{done.stdout}"
        return done.stdout

    def processes(self, name: str) -> int:
        """How many of the machine's processes have `name` in their command line."""
        lines = self.run("ps -eo args").splitlines()
        return sum(name in line and "ps -eo" not in line for line in lines)

    def power_off(self) -> None:
        """Ends the machine's first process, and the kernel all others with it."""
        self._process.kill()
        self._process.wait()


def _kept() -> list[str]:
    """This project and this Python, where a folder that each machine has of its own would hide them."""
    needed = {Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix)}
    return sorted(str(path) for path in needed if any(path.is_relative_to(own) for own in _OWN))


def _path() -> str:
    return f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


_BOOT = """
set -euo pipefail
mkdir -p {scratch}/shared
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt && mkdir /mnt/shared /mnt/lan && mount --bind {scratch}/shared /mnt/shared
mount --bind {scratch} /mnt/lan && mkdir /mnt/host && mount --rbind / /mnt/host
for folder in {own}; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
for kept in {kept}; do mkdir -p "$kept" && mount --rbind "/mnt/host$kept" "$kept"; done && umount -l /mnt/host
mkdir -m 700 {home} && mkdir -p /run/sshd {home}/.ssh
printf '%s\\n' '{user}:x:0:0::{home}:/bin/bash' 'sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' \\
    'nobody:x:65534:65534::/:/usr/sbin/nologin' > /run/passwd
mount --bind /run/passwd /etc/passwd
printf '%s\\n' '127.0.0.1 localhost' {hosts} > /run/hosts && mount --bind /run/hosts /etc/hosts
hostname {name}
ip link set lo up
cp /mnt/lan/key {home}/.ssh/id_ed25519 && chmod 600 {home}/.ssh/id_ed25519
cp /mnt/lan/key.pub {home}/.ssh/authorized_keys
touch {home}/.bashrc
echo ready > /mnt/lan/{name}.ready
until test -e /mnt/lan/{name}.wired; do sleep 0.05; done
{sshd} -D -e -f /dev/null -o HostKey=/mnt/lan/host_key -o PasswordAuthentication=no -o UsePAM=no \\
    -o PermitRootLogin=prohibit-password -o StrictModes=no -o PidFile=none -o MaxStartups=100 &
# The shell stays, since what loses its parent comes to the first process, which has to take note of its end.
wait
"""


class Lan:
    """A host's machines, `laptop` (10.77.0.1) among them, on one Ethernet that leads nowhere else."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.machines: dict[str, Machine] = {}
        self.addresses: dict[str, str] = {}

    @property
    def shared(self) -> Path:
        """The folder that every machine has as /mnt/shared."""
        return self.scratch / "shared"

    def start(self, names: Sequence[str]) -> None:
        """Boots and wires the machines; the first is the Ethernet's switch."""
        self.addresses = {name: f"10.77.0.{n + 1}" for n, name in enumerate(names)}
        for key in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.scratch / key], check=True
            )
        for name in names:
            self._boot(name)
        switch = self.switch
        switch.run(f"ip link add lan type bridge && ip address add {self.addresses[switch.name]}/24 dev lan")
        switch.run("ip link set lan up")
        for name in names[1:]:
            self._wire(switch, self.machines[name])
        for name in names:
            self._wait_up(name)

    @property
    def switch(self) -> Machine:
        """The machine at which all cables end, each at a port of the other machine's name."""
        return next(iter(self.machines.values()))

    def power_on(self, name: str) -> None:
        """Boots a machine again after its `power_off`: empty but for what is shared; not the switch."""
        for mark in ("ready", "wired"):
            (self.scratch / f"{name}.{mark}").unlink()
        # The kernel takes a while to clear the old machine's network away.
        self.switch.run(f"ip link delete {name}", check=False)
        self._boot(name)
        self._wire(self.switch, self.machines[name])
        self._wait_up(name)

    def _wait_up(self, name: str) -> None:
        (self.scratch / f"{name}.wired").touch()
        up = "until (: < /dev/tcp/127.0.0.1/22) 2> /dev/null; do sleep 0.1; done"
        self.machines[name].run(up, timeout=_START_S)

    def _boot(self, name: str) -> None:
        hosts = " ".join(shlex.quote(f"{address} {host}") for host, address in self.addresses.items())
        script = _BOOT.format(
            name=name,
            scratch=self.scratch,
            user=USER,
            home=HOME,
            sshd=SSHD,
            hosts=hosts,
            own=shlex.join(_OWN),
            kept=shlex.join(_kept()),
        )
        with (self.scratch / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child", "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_S
        while not (self.scratch / f"{name}.ready").exists():
            said = (self.scratch / f"{name}.log").read_text()
            assert process.poll() is None, f"{name} ended: {said}"
            assert time.monotonic() < deadline, f"{name} does not start: {said}"
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self.machines[name] = Machine(name, process, int(children[0]))

    def _wire(self, switch: Machine, machine: Machine) -> None:
        """A virtual cable from the machine to the switch; nothing of it is on the host."""
        address = self.addresses[machine.name]
        host = ["nsenter", f"--target={switch.pid}", "--net"]
        cable = [
            "ip",
            "link",
            "add",
            machine.name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(machine.pid),
        ]
        subprocess.run([*host, *cable], check=True)
        switch.run(f"ip link set {machine.name} master lan up")
        machine.run(f"ip address add {address}/24 dev eth0 && ip link set eth0 up")

    def power_off(self) -> None:
        for machine in self.machines.values():
            machine.power_off()


@contextmanager
def lan(scratch: Path, names: Sequence[str]) -> Iterator[Lan]:
    """Machines for the time of a test; with them end all their processes, mounts and networks."""
    network = Lan(scratch)
    try:
        network.start(names)
        yield network
    finally:
        network.power_off()
