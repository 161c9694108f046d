"""Record files: whole lines, each step once, whatever happens to the writer."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disks import small_disk

from dtr_ray.service.records import RecordWriter, read_lines, record_path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path, key: str) -> list[int]:
    return [r["step"] for r in records(path) if r["kind"] == "metrics" and key in r["values"]]


def test_every_kind_of_record_is_one_line_with_its_time(tmp_path):
    path = record_path(tmp_path, "t0003", "worker")
    with RecordWriter(path) as writer:
        writer.start("trial 3", {"a": 1}, {"routing.alpha": 4.0, "seed": None}, "sweep")
        writer.metrics(10, {"loss": 0.5})
        writer.tags({"device": "cpu"})
        writer.params({"x": [1, 2]})
        writer.artifact("trials/t0003/grid.png", "samples")
        writer.end("KILLED")
    assert path == tmp_path / "tracking" / "t0003" / "worker.jsonl"
    found = records(path)
    assert [r["kind"] for r in found] == ["start", "metrics", "tags", "params", "artifact", "end"]
    assert found[0]["params"] == {"routing.alpha": "4.0", "seed": "None"}
    assert found[0]["parent"] == "sweep"
    times = [r["time_ms"] for r in found]
    assert times == sorted(times)
    assert times[0] > 1_600_000_000_000


def test_records_are_on_disk_before_the_call_returns(tmp_path):
    writer = RecordWriter(tmp_path / "w.jsonl")
    writer.metrics(1, {"loss": 1.0})
    assert len(records(tmp_path / "w.jsonl")) == 1


@pytest.mark.parametrize("torn", [b'{"kind":"metrics","time', b"\0\0\0\0", b'{"kind":"end"}'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "w.jsonl"
    with RecordWriter(path) as writer:
        writer.metrics(1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(torn)
    with RecordWriter(path) as writer:
        writer.metrics(2, {"loss": 2.0})
    assert steps(path, "loss") == [1, 2]


def test_a_damaged_line_in_the_middle_is_passed_over(tmp_path):
    path = tmp_path / "w.jsonl"
    with RecordWriter(path) as writer:
        writer.metrics(1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b"\0\0garbage\n[1]\n")
    with RecordWriter(path) as writer:
        writer.metrics(1, {"loss": 1.0})
        writer.metrics(2, {"loss": 2.0})
    lines = read_lines(path, 0)
    assert [line.record is None for line in lines] == [False, True, True, False]


def test_steps_repeated_after_a_resume_are_dropped_key_by_key(tmp_path):
    path = tmp_path / "w.jsonl"
    with RecordWriter(path) as writer:
        writer.metrics(10, {"loss": 1.0})
        writer.metrics(20, {"loss": 0.9, "fid": 50.0})
        writer.metrics(30, {"loss": 0.8})
    with RecordWriter(path) as writer:
        writer.metrics(20, {"loss": 0.9, "fid": 50.0})
        writer.metrics(30, {"loss": 0.8, "fid": 40.0})
        writer.metrics(40, {"loss": 0.7})
    assert steps(path, "loss") == [10, 20, 30, 40]
    assert steps(path, "fid") == [20, 30]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(restarts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 25)), max_size=6))
def test_any_sequence_of_kills_and_resumes_leaves_each_step_once(tmp_path_factory, restarts):
    path = tmp_path_factory.mktemp("records") / "w.jsonl"
    done = 0
    for length, torn, back in restarts:
        first = max(0, done - back)
        with RecordWriter(path) as writer:
            for step in range(first, first + length):
                writer.metrics(step, {"loss": float(step)})
        whole = path.read_bytes()
        # A kill takes the end of the last line, but never more than was written since.
        cut = min(torn, len(whole.splitlines(keepends=True)[-1]) - 1) if whole else 0
        path.write_bytes(whole[: len(whole) - cut])
        lines = read_lines(path, 0)
        done = lines[-1].record["step"] + 1 if lines else 0
    with RecordWriter(path):
        pass
    assert steps(path, "loss") == list(range(done))


def test_non_finite_values_are_counted_and_kept_out_of_the_metrics(tmp_path):
    path = tmp_path / "w.jsonl"
    with RecordWriter(path) as writer:
        writer.metrics(1, {"loss": math.nan, "lr": 0.1})
    with RecordWriter(path) as writer:
        writer.metrics(1, {"loss": math.nan, "lr": 0.1})
        writer.metrics(2, {"loss": math.inf, "lr": 0.1})
    first, second = records(path)
    assert first["values"] == second["values"] == {"lr": 0.1}
    assert first["non_finite"] == {"loss": ["nan", 1, 1]}
    assert second["non_finite"] == {"loss": ["inf", 1, 2]}


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda w: w.metrics(-1, {"a": 1.0}), "-1"),
        (lambda w: w.metrics(2**63, {"a": 1.0}), "9223372036854775808"),
        (lambda w: w.end("DONE"), "FINISHED, KILLED, FAILED, not 'DONE'"),
        (lambda w: w.artifact("/etc/passwd"), "/etc/passwd"),
    ],
)
def test_what_no_record_can_hold_is_a_value_error(tmp_path, call, part):
    writer = RecordWriter(tmp_path / "w.jsonl")
    with pytest.raises(ValueError, match=part):
        call(writer)
    assert not records(tmp_path / "w.jsonl")


DISK_FULL = """
    import resource, sys
    from pathlib import Path
    from dtr_ray.service.records import RecordWriter
    import logging
    logging.basicConfig(level=logging.WARNING)
    path = Path(sys.argv[1])
    writer = RecordWriter(path)
    writer.start("run", {}, {}, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Not the end of a line: the last write that fits is torn.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 200, hard))
    for step in range(50):
        writer.metrics(step, {"loss": float(step)})
    assert writer.num_waiting > 40, writer.num_waiting
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.metrics(50, {"loss": 50.0})
    assert writer.num_waiting == 0
"""


def run_python(code: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_stops_nobody_and_loses_nothing(tmp_path):
    path = tmp_path / "w.jsonl"
    done = run_python(DISK_FULL, path)
    assert done.returncode == 0, done.stderr
    assert steps(path, "loss") == list(range(51))
    assert done.stderr.count("cannot be written") == 1
    assert done.stderr.count("can be written again") == 1


TMPFS_FULL = """
    import sys
    from pathlib import Path
    from dtr_ray.service.records import RecordWriter
    folder = Path(sys.argv[1])
    ballast = folder / "ballast"
    writer = RecordWriter(folder / "w.jsonl")
    writer.metrics(0, {"loss": 0.0})
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError:
        pass
    for step in range(1, 200):
        writer.metrics(step, {"loss": float(step)})
    assert writer.num_waiting > 0
    late = RecordWriter(folder / "new" / "late.jsonl")
    late.metrics(0, {"loss": 0.0})
    ballast.unlink()
    writer.close()
    late.close()
"""


def test_a_full_file_system_stops_nobody_and_loses_nothing(tmp_path):
    with small_disk(tmp_path / "small", "64k") as folder:
        done = run_python(TMPFS_FULL, folder)
        assert done.returncode == 0, done.stderr
        assert steps(folder / "w.jsonl", "loss") == list(range(200))
        assert steps(folder / "new" / "late.jsonl", "loss") == [0]


def test_what_waits_in_memory_is_bounded(tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    writer = RecordWriter(tmp_path / "file" / "w.jsonl", max_waiting=10)
    for step in range(100):
        writer.metrics(step, {"loss": 1.0})
    assert writer.num_waiting == 10
    (tmp_path / "file").unlink()
    writer.metrics(100, {"loss": 1.0})
    assert steps(tmp_path / "file" / "w.jsonl", "loss") == list(range(90, 101))


WRITE_FOR_EVER = """
    import sys
    from pathlib import Path
    from dtr_ray.service.records import RecordWriter
    writer = RecordWriter(Path(sys.argv[1]))
    print("ready", flush=True)
    for step in range(10**9):
        writer.metrics(step, {"loss": float(step), "x" * 50: 1.0})
"""


def test_a_killed_writer_leaves_whole_lines_in_order(tmp_path):
    path = tmp_path / "w.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(WRITE_FOR_EVER), str(path)]
    for _ in range(3):
        before = len(read_lines(path, 0))
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            while len(read_lines(path, 0)) < before + 50 and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
    RecordWriter(path).close()
    found = steps(path, "loss")
    assert found == list(range(len(found)))
    assert len(found) >= 150
