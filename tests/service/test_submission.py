"""Sweeps as Ray jobs, on a real cluster, from processes of their own.

They take minutes: `pytest -m slow -n 0 -s --timeout 3600 tests/service/test_submission.py`
"""

import json
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_cluster import Cluster, Laptop
from ray.job_submission import JobStatus
from tiny_sweeps import folder_of, read_json, records, tiny_sweep, wait_until

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import TrialRecord, read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SECRET = "s3cr3t-planted-word"
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "DTR_RAY_STUDY_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
LONG = {
    "trial__training__num_steps": 400,
    "trial__evaluation__every_steps": 100,
    "early_stopping": {"name": "none"},
}


@pytest.fixture(scope="module")
def cluster(shared_cache: Path) -> Iterator[Cluster]:
    # The path of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="dtr", ignore_cleanup_errors=True) as folder:
        found = Cluster(Path(folder))
        yield found
        found.end()


@pytest.fixture
def laptop(tmp_path: Path, cluster: Cluster) -> Iterator[Laptop]:
    """Ends what still runs."""
    found = Laptop(tmp_path / "laptop", cluster)
    yield found
    found.end()
    for job in cluster.jobs.list_jobs():
        if job.submission_id and not job.status.is_terminal():
            cluster.jobs.stop_job(job.submission_id)


def place(laptop: Laptop, config: SweepConfig) -> str:
    """Writes the sweep's file; its name."""
    file = f"{config.name}.yaml"
    (laptop.folder / file).write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return file


def test_a_sweep_is_submitted_left_followed_again_and_completes(
    laptop: Laptop, cluster: Cluster, tmp_path: Path
):
    config = tiny_sweep(tmp_path / "runs", name="left", search__num_trials=3)
    file = place(laptop, config)
    for name in (".env", "data/0.png", ".git/config"):
        (laptop.folder / name).parent.mkdir(exist_ok=True)
        (laptop.folder / name).write_text(SECRET)
    first = laptop.start(file, "--submit", **dict.fromkeys(SECRETS, SECRET))
    laptop.wait_for(first, "t0000 starts")
    code, printed = laptop.do(file, "--submit")
    assert (code, printed.count("\n")) == (2, 2), printed
    assert "error: left runs there already, as left@1; follow it with" in printed
    first.send_signal(signal.SIGINT)
    assert first.wait(30.0) == 130
    assert "detached: left goes on" in laptop.printed(first)
    assert "--attach left" in laptop.printed(first)
    assert not cluster.jobs.get_job_info("left@1").status.is_terminal()

    code, printed = laptop.do("--attach")
    assert code == 0, printed
    assert "t0000 starts" in printed
    assert "train best  python -m dtr_ray.train_best" in printed
    folder = folder_of(config)
    assert read_json(folder / "best.json")["trial_id"] in records(folder)
    assert [r.status for r in records(folder).values()].count("running") == 0
    assert laptop.do("--attach", "left@1")[0] == 0
    code, printed = laptop.do("--list")
    assert code == 0
    assert "left@1" in printed
    assert "completed" in printed

    job = cluster.jobs.get_job_info("left@1")
    assert SECRET not in job.json()
    assert SECRET not in cluster.jobs.get_job_logs("left@1")
    assert SECRET not in laptop.printed(first) + printed
    shipped = list(
        (cluster.folder / "session_latest" / "runtime_resources" / "working_dir_files").glob(
            "*/left.resolved.yaml"
        )
    )
    assert len(shipped) == 1
    sent = [path for path in shipped[0].parent.rglob("*") if path.is_file()]
    assert not [path for path in sent if SECRET.encode() in path.read_bytes()]
    assert {path.name for path in shipped[0].parent.iterdir()} == {"dtr_ray", "left.resolved.yaml"}


def test_a_stopped_sweep_is_resumed_by_the_command_that_it_prints(laptop: Laptop, tmp_path: Path):
    config = tiny_sweep(
        tmp_path / "runs", name="stopped", search__num_trials=2, trial__training__batch_size=96, **LONG
    )
    file, folder = place(laptop, config), folder_of(config)
    code, printed = laptop.do(file, "--submit", "--detach")
    assert code == 0, printed
    assert "python -m dtr_ray.sweep --stop stopped" in printed
    wait_until(lambda: any(record.last_step for record in begun(folder).values()), 600.0, "a checkpoint")
    code, printed = laptop.do("--stop", "stopped")
    assert code == 0, printed
    resume = "python -m dtr_ray.sweep stopped.yaml --submit --resume"
    assert printed.splitlines()[-2:] == ["stopped@1 stopped; everything is kept. To go on:", f"  {resume}"]
    before = records(folder)
    code, printed = laptop.do("--attach", "stopped")
    assert code == 130
    assert printed.count(resume) == 2, "the driver says it, and the command"
    assert laptop.do("--stop", "stopped")[0] == 2

    code, printed = laptop.do(*resume.split()[3:])
    assert code == 0, printed
    assert "submitted as stopped@2" in printed
    assert "going on from step" in printed
    after = records(folder)
    assert set(before) <= set(after)
    assert {record.status for record in after.values()} == {"completed"}
    assert all(after[t].reports[s] == m for t, r in before.items() for s, m in r.reports.items())


def begun(folder: Path) -> dict[str, TrialRecord]:
    """The sweep's trials, as far as there is a sweep."""
    return records(folder) if (folder / "journal.jsonl").exists() else {}


def test_what_is_wrong_there_comes_back_in_one_line_with_its_code(laptop: Laptop, tmp_path: Path):
    data = {"name": "folder", "path": "/mnt/not/there", "resolution": 8}
    config = tiny_sweep(tmp_path / "runs", name="wrong", trial__data=data)
    code, printed = laptop.do(place(laptop, config), "--submit")
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "trial.data.path: '/mnt/not/there' does not exist" in errors[0]
    assert "Traceback" not in printed
    assert not folder_of(config).exists()
    code, printed = laptop.do("--attach", "nobody")
    assert code == 2
    assert "no sweep 'nobody' has been submitted" in printed


@pytest.mark.parametrize("form", ["http", "gcs", "client"])
def test_a_cluster_is_found_by_each_of_its_addresses(laptop: Laptop, cluster: Cluster, form: str):
    address = {"http": cluster.server, "gcs": cluster.gcs, "client": cluster.client}[form]
    code, printed = laptop.do("--list", "--address", address, RAY_API_SERVER_ADDRESS="http://127.0.0.1:1")
    assert code == 0, printed


def test_who_has_no_token_is_told_so(laptop: Laptop):
    code, printed = laptop.do("--list", RAY_AUTH_MODE="disabled")
    assert code == 2
    assert "does not know us: set RAY_AUTH_MODE=token" in printed
    code, printed = laptop.do("--list", RAY_API_SERVER_ADDRESS="http://127.0.0.1:1")
    assert code == 2
    assert "error: no Ray job server answers at http://127.0.0.1:1" in printed
    assert "Traceback" not in printed


def test_everything_that_json_reads_is_json(laptop: Laptop, tmp_path: Path):
    data = {"name": "folder", "path": "/mnt/not/there", "resolution": 8}
    config = tiny_sweep(tmp_path / "runs", name="lines", trial__data=data)
    code, printed = laptop.do(place(laptop, config), "--submit", "--log-format", "json")
    assert code == 2, printed
    lines = [json.loads(line) for line in printed.splitlines()]
    errors = [line for line in lines if line["level"] == "ERROR"]
    assert [e["message"].startswith("error: ") for e in errors] == [True]


def test_two_sweeps_get_on_side_by_side_and_never_want_more_than_there_is(
    laptop: Laptop, cluster: Cluster, tmp_path: Path
):
    configs = [
        tiny_sweep(tmp_path / "runs", name=name, search__num_trials=4, **LONG) for name in ("first", "second")
    ]
    files = [place(laptop, config) for config in configs]
    assert laptop.do(files[0], "--submit", "--detach")[0] == 0
    seen: list[dict[str, int]] = []

    def look() -> dict[str, int]:
        seen.append(cluster.claims())
        return seen[-1]

    wait_until(lambda: look().get("first") == 2, 300.0, "the first has the cluster to itself")
    assert laptop.do(files[1], "--submit", "--detach")[0] == 0
    jobs = ["first@1", "second@1"]

    def both_ended() -> bool:
        look()
        time.sleep(0.2)
        return all(cluster.jobs.get_job_info(job).status.is_terminal() for job in jobs)

    wait_until(both_ended, 900.0, "both sweeps end")
    assert [cluster.jobs.get_job_info(job).status for job in jobs] == [JobStatus.SUCCEEDED] * 2
    assert max(sum(running.values()) for running in seen) == 2
    assert {"first": 1, "second": 1} in seen
    for config in configs:
        found: dict[str, Any] = records(folder_of(config))
        assert [record.status for record in found.values()] == ["completed"] * 4
    # Both had trials that ended before the other's last began.
    assert overlap(folder_of(configs[0]), folder_of(configs[1])) > 0
    assert cluster.claims() == {}


def overlap(one: Path, two: Path) -> float:
    """Seconds for which both sweeps had begun and neither had ended."""
    times = [[event["time"] for event in read_events(folder / "journal.jsonl")] for folder in (one, two)]
    return min(t[-1] for t in times) - max(t[0] for t in times)
