#!/usr/bin/env bash
# A sweep under Slurm: Ray on the nodes of one job, which ends with the sweep. From the repository's root:
#
#   sbatch cluster/slurm.sh search_spaces/ffhq.yaml --output /shared/runs
#
# What follows slurm.sh goes to `python -m dtr_ray.sweep`. A job that is requeued (preempted, a node lost) goes on where
# its sweep was. The environment is ./.venv or $DTR_RAY_HOME/.venv (README), the same on every node, with the Ray of
# constraints.txt: 2.60.0. This folder, the token below $DTR_RAY_HOME and --output must be on a file system that all
# nodes share. Change the numbers to your cluster's, here or on sbatch's command line:
#SBATCH --job-name=dtr-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Two minutes before the end: the sweep stops in good order, and can be resumed.
#SBATCH --signal=B:TERM@120
set -euo pipefail

RAY_VERSION=2.60.0
START_S=${DTR_RAY_START_S:-300}
steps=()

say() { printf '%s slurm.sh: %s\n' "$(date +%T)" "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# Sets the environment of every node; `srun` hands it on.
prepare() {
    local root
    # sbatch runs a copy of this file, in the folder where it was typed.
    root=${SLURM_SUBMIT_DIR:-$PWD}
    [[ -f $root/cluster/activate ]] || fail "type sbatch in the repository's root; $root has no cluster/activate"
    cd "$root"
    export DTR_RAY_HOME=${DTR_RAY_HOME:-$root}
    # One token a job, which only its owner can read.
    export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$DTR_RAY_HOME/.dtr-ray-token-$SLURM_JOB_ID}
    # shellcheck source=cluster/activate
    source "$root/cluster/activate"
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    python -c "import ray; assert ray.__version__ == '$RAY_VERSION', ray.__version__"
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
}

# Ray's ports and its folder for sockets and logs, such that two jobs on one node do not meet.
choose_ports() {
    local offset=$((SLURM_JOB_ID % 500 * 10))
    port=$((20000 + offset))
    temporary=/tmp/ray-$SLURM_JOB_ID
    common=(
        --node-manager-port=$((port + 1)) --object-manager-port=$((port + 2)) --runtime-env-agent-port=$((port + 3))
        --dashboard-agent-listen-port=$((port + 4)) --dashboard-agent-grpc-port=$((port + 5))
        --metrics-export-port=$((port + 6))
    )
    head_options=(
        --head --port="$port" --dashboard-port=$((port + 7)) --ray-client-server-port=$((port + 8))
        --temp-dir="$temporary"
    )
}

# Starts Ray on a node, as a step of the job that lives as long as Ray does there.
start_on() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --export=ALL ray start "$@" "${common[@]}" \
        "${resources[@]}" --disable-usage-stats --block &
    steps+=($!)
}

alive_nodes() {
    python - << 'PYTHON' 2> /dev/null
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
}

# Waits until as many nodes are there as given, and no step of the job has ended.
wait_for_nodes() {
    local wanted=$1 deadline=$((SECONDS + START_S)) alive=0 step
    while :; do
        for step in "${steps[@]}"; do
            kill -0 "$step" 2> /dev/null || fail "Ray ended on a node while it started: see above"
        done
        alive=$(alive_nodes || true)
        [[ ${alive:-0} -lt $wanted ]] || return 0
        ((SECONDS < deadline)) || fail "only ${alive:-0} of $wanted nodes have joined after $START_S s"
        sleep 2
    done
}

# The first node's address, as the others reach it.
address_of() {
    srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap hostname --all-ip-addresses | tr ' ' '\n' | grep -m 1 .
}

stop() {
    local status=$?
    trap - EXIT TERM INT
    say "stopping Ray on ${#steps[@]} nodes"
    ((${#steps[@]} == 0)) || kill "${steps[@]}" 2> /dev/null || true
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
    exit "$status"
}

main() {
    (($# > 0)) || fail "usage: sbatch cluster/slurm.sh SPACE.yaml [options of python -m dtr_ray.sweep]"
    local nodes node address status=0
    prepare
    choose_ports
    trap stop EXIT
    resources=()
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || resources+=(--num-cpus="$SLURM_CPUS_PER_TASK")
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || resources+=(--num-gpus="$SLURM_GPUS_ON_NODE")
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address=$(address_of "${nodes[0]}")
    export RAY_ADDRESS=$address:$port
    say "Ray's head on ${nodes[0]} ($RAY_ADDRESS), workers on ${nodes[*]:1}"
    start_on "${nodes[0]}" "${head_options[@]}" --node-ip-address="$address" --dashboard-host="$address"
    wait_for_nodes 1
    for node in "${nodes[@]:1}"; do
        start_on "$node" --address="$RAY_ADDRESS"
    done
    wait_for_nodes "${#nodes[@]}"
    say "${#nodes[@]} nodes are up"
    # In the background, so that this shell answers signals. Where there is nothing to resume, it begins.
    python -m dtr_ray.sweep "$@" --resume &
    sweep=$!
    trap 'kill -TERM "$sweep"' TERM INT
    # The first wait ends with a signal, the second with the sweep.
    wait "$sweep" || status=$?
    ! kill -0 "$sweep" 2> /dev/null || { wait "$sweep" && status=0 || status=$?; }
    exit "$status"
}

# Sourced by its test, run by Slurm.
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
