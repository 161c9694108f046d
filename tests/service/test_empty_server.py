"""A sweep's tracking server comes back with an empty database, in its midst and after its end.

Takes about two minutes on two cores:

    python -m pytest -m slow tests/service/test_empty_server.py -n 0 --timeout 3600
"""

import shutil
from pathlib import Path

import pytest
from kills import check_accounts, check_mlflow, run_to_the_end
from service.mlflow_server import MlflowServer
from tiny_sweeps import folder_of, records, sweep_command, tiny_sweep, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def empty(server: MlflowServer, folder: Path) -> None:
    """Its database and its artifacts are gone."""
    server.kill()
    for path in folder.glob("server.db*"):
        path.unlink()
    shutil.rmtree(folder / "artifacts", ignore_errors=True)
    server.start()
    server.wait(300.0)


def test_all_records_arrive_once_though_the_server_has_twice_come_back_empty(
    tmp_path: Path, shared_cache: Path
):
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        server.wait(300.0)
        config = tiny_sweep(
            tmp_path,
            tracking__uri=server.uri,
            search__num_trials=4,
            resources__max_concurrent=1,
            trial__training__batch_size=192,
        )
        folder = folder_of(config)
        with sweep_command(config) as command:
            wait_until(lambda: sum(t.status != "running" for t in records(folder).values()) >= 2, 600.0)
            empty(server, tmp_path / "server")
            assert command.wait(600.0) == 0, command.output
        run_to_the_end(config, "--resume")
        check_accounts(config)
        check_mlflow(config, server.uri)
        empty(server, tmp_path / "server")
        run_to_the_end(config, "--resume")
        check_mlflow(config, server.uri)
    finally:
        server.kill()
