"""A trial needs more memory than there is: it fails with that reason, and the others go on.

What is slow takes two minutes on two cores:

    python -m pytest -m slow tests/service/test_memory.py -n 0 -s --timeout 600
"""

from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
import torch
from control_groups import can_limit, little_memory
from kills import runs_of
from mlflow import MlflowClient
from tiny_sweeps import folder_of, records, sweep_command, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.service.trial import reason_of

GB = 2**30
CHANGES: dict[str, Any] = {
    "early_stopping": {"name": "none"},
    "resources__max_concurrent": 2,
    "trial__training__num_steps": 120,
    "trial__training__batch_size": 192,
    "trial__evaluation__every_steps": 60,
    "failures__retries": 1,
    "space": {"model.hidden_size": {"type": "int", "low": 32, "high": 2**20}},
    "search__sampler": "points",
    "search__num_startup_trials": 0,
}


def sweep_of(output: Path, large: int) -> SweepConfig:
    """Three trials, of which the second has a large model."""
    points = [{"model.hidden_size": size} for size in (32, large, 64)]
    return tiny_sweep(output, **CHANGES, search__num_trials=3, search__starting_points=points)


def check_others_went_on(config: SweepConfig) -> str:
    """Returns the reason why the second has failed."""
    trials = list(records(folder_of(config)).values())
    assert [trial.status for trial in trials] == ["completed", "failed", "completed"]
    check_failed_run(config, trials[1].reason)
    return trials[1].reason


def check_failed_run(config: SweepConfig, reason: str) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder_of(config).parent / 'mlflow.db'}")
    tags = runs_of(client, config.name)[1]["t0001"].data.tags
    assert (tags["dtr_ray.status"], tags["dtr_ray.reason"]) == ("failed", reason)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ray.exceptions.OutOfMemoryError("Memory on the node was 15.2GB / 16.0GB (0.95)"),
    ],
)
def test_every_library_s_word_for_it_becomes_out_of_memory(error: Exception):
    assert reason_of(error).startswith("out of memory")


def test_what_pytorch_says_on_the_cpu_becomes_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**45)
    assert reason_of(raised.value).startswith("out of memory: ")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trial_whose_memory_is_refused_fails_at_once(tmp_path: Path, shared_cache: Path):
    config = sweep_of(tmp_path, 2**20)
    with sweep_command(config, RAY_ADDRESS="local") as command:
        assert command.wait(900.0) == 0, command.output
    assert check_others_went_on(config).startswith("out of memory: ")
    assert records(folder_of(config))["t0001"].retries == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not can_limit(), reason="needs a memory control group to write to")
def test_a_trial_that_the_kernel_ends_for_want_of_memory_is_retried_and_then_fails(
    tmp_path: Path, shared_cache: Path
):
    config = sweep_of(tmp_path, 4096)
    environment = {"RAY_memory_monitor_refresh_ms": "0", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    with little_memory(5 * GB) as group, sweep_command(config, RAY_ADDRESS="local", **environment) as command:
        (group / "cgroup.procs").write_text(str(command.process.pid))
        assert command.wait(900.0) == 0, command.output
    reason = check_others_went_on(config)
    assert reason.startswith("its process died 2 times (failures.retries): out of memory: the kernel"), reason
    assert records(folder_of(config))["t0001"].retries == 1
