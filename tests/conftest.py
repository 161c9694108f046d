"""What all tests share: quiet, offline, single-threaded libraries, one cache, at most one Ray instance."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import BINARIES, Postgres
from xdist.scheduler import LoadScopeScheduling

# Read by the libraries when they are first imported, hence here and not in a fixture.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    MPLBACKEND="Agg",
)
# A submitted sweep is run by the `python` of the path, as it is in an activated environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# Tests neither join a cluster nor write to a server that the developer's shell names.
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_name, None)


_WITH_RAY = frozenset(
    {
        "service/test_claims.py",
        "service/test_cluster.py",
        "service/test_disk_full.py",
        "service/test_display.py",
        "service/test_doctor.py",
        "service/test_empty_server.py",
        "service/test_fetching.py",
        "service/test_kill.py",
        "service/test_log_format.py",
        "service/test_metrics.py",
        "service/test_parts.py",
        "service/test_placement.py",
        "service/test_power.py",
        "service/test_prepared_sweep.py",
        "service/test_preparing.py",
        "service/test_proxies.py",
        "service/test_results.py",
        "service/test_resume.py",
        "service/test_submission.py",
        "service/test_sweep.py",
        "service/test_working_folder.py",
        "test_analyze.py",
        "test_prepare.py",
        "test_sweep_command.py",
        "test_train_best.py",
    }
)
"""Modules of the tests that start Ray, in this process or in one of their own."""


class _RayTogether(LoadScopeScheduling):
    """Each test goes to the process that is free; those with Ray all to one: there is no second Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.split("::")[0].removeprefix("tests/") in _WITH_RAY else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How `-n` shares the tests out."""
    return _RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses Ray, runs it last, and skips what needs a GPU where there is none."""
    import torch

    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            module = item.nodeid.split("::")[0].removeprefix("tests/")
            assert module in _WITH_RAY, f"tests/{module} takes ray_cluster: add it to _WITH_RAY"
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """DTR_RAY_CACHE in a folder of this session: data and statistics are computed once for all tests."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DTR_RAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def ray_cluster(shared_cache: Path) -> Iterator[str]:
    """The session's one Ray instance, 2 CPUs; yields its address, which RAY_ADDRESS hands to subprocesses.

    With the dashboard: without its state server Ray Train's clean-up of a stopped trial never ends. And only
    one: with two instances on a machine that clean-up does not know which to ask.
    """
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=True,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        # For the tests that look at the exporter: the default is 10 s.
        _system_config={"metrics_report_interval_ms": 2000},
    )
    address = context.address_info["gcs_address"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        yield address
    ray.shutdown()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One PostgreSQL for all tests, which may stop or kill it."""
    if BINARIES is None:
        pytest.skip("needs Debian's postgresql")
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Postgres:
    """The same, running."""
    if not postgres_server.running:
        postgres_server.start()
    return postgres_server
