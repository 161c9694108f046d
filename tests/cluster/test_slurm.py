"""cluster/slurm.sh: clean shell, and run for real over two machines, with ssh in the place of srun."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cluster.machines import Lan
from cluster.sweeps import PARTS, SWEEP, finished_trials, hosts_of_trials, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster/slurm.sh"
SHIMS = {
    # `srun` runs a command on another node, in this shell's folder and environment, and ends it as it ends.
    "srun": r"""
while [[ $1 == --* ]]; do
    [[ $1 != --nodelist=* ]] || node=${1#*=}
    shift
done
file=$(mktemp /mnt/shared/environment.XXXXXX)
export -p > "$file"
trap 'kill $! 2> /dev/null; wait' TERM
line="source $file; cd $PWD; exec $(printf '%q ' "$@")"
ssh -tt -q -o StrictHostKeyChecking=no "$node" "$line" < /dev/null &
wait $!
""",
    "scontrol": '[[ "$1 $2" == "show hostnames" ]] && tr , "\\n" <<< "$3"\n',
}


def test_the_shell_can_read_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", "--external-sources", SCRIPT], cwd=ROOT, check=True)


def test_it_asks_slurm_for_whole_nodes_a_restart_and_a_warning():
    lines = SCRIPT.read_text().splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")}
    assert options >= {"exclusive", "requeue", "ntasks-per-node=1", "signal=B:TERM@120", "open-mode=append"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_sweeps_over_its_nodes_and_leaves_nothing_running(
    start_lan: Callable[[Sequence[str]], Lan], tmp_path: Path
):
    network = start_lan(["one", "two"])
    shims = tmp_path / "shared/bin"
    shims.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\nset -u\n{body}")
        (shims / name).chmod(0o755)
    job = (
        f"cd {ROOT} && PATH=/mnt/shared/bin:$PATH SLURM_JOB_ID=1234 SLURM_JOB_NODELIST=one,two "
        f"SLURM_CPUS_PER_TASK=2 DTR_RAY_HOME=/mnt/shared {SCRIPT} {SWEEP}"
    )
    one, two = network.machines["one"], network.machines["two"]
    said = one.run(job, timeout=900)
    assert "2 nodes are up" in said, said
    assert finished_trials(network.shared / "runs") == 4
    hosts = hosts_of_trials(network.shared / "runs")
    assert set(hosts.values()) == {"one", "two"}, hosts
    for machine in (one, two):
        wait_until(
            lambda m=machine: not any(m.processes(part) for part in PARTS), f"{machine.name}'s Ray ends"
        )
    assert not list(network.shared.glob(".dtr-ray-token*")), "the token is gone with its job"
    print(f"\n{said}\n{hosts}")
