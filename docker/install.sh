#!/usr/bin/env bash
# What the images of this folder hold, as steps; tests/docker runs the same ones without Docker:
#
#   docker/install.sh worker-system     Debian's packages of the workers' image, as root
#   docker/install.sh worker-python     this package as constraints.txt pins it, into the `python` in PATH
#   docker/install.sh tracking-python   the MLflow server of constraints.txt, into the `python` in PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_with_pip() {
    python -m pip install --no-cache-dir --disable-pip-version-check --quiet --constraint constraints.txt "$@"
}

# Fails where NAME's version is not the one of constraints.txt.
check_version() {
    local name=$1 pinned found
    pinned=$(sed -n "s/^$name==//p" constraints.txt)
    found=$(python -c "import importlib.metadata as m; print(m.version('$name'))")
    [[ -n $pinned && $found == "$pinned" ]] || {
        printf '%s is %s, constraints.txt has %s\n' "$name" "$found" "$pinned" >&2
        exit 1
    }
}

worker_system() {
    # gcc: Triton, for torch.compile. git: the commit on the MLflow run. openssh-client, rsync: the autoscaler on the
    # head. tini: reaps what Ray leaves. tmux: ray exec --tmux.
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
        gcc git libc6-dev openssh-client rsync tini tmux > /dev/null
    rm -rf /var/lib/apt/lists/*
}

worker_python() {
    install_with_pip ".[cluster,text]"
    check_version ray
}

tracking_python() {
    install_with_pip --requirement docker/tracking.txt
    check_version mlflow
}

case ${1:-} in
    worker-system) worker_system ;;
    worker-python) worker_python ;;
    tracking-python) tracking_python ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
