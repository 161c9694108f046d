from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtr_ray.training.reports import Report, ReportFile, best_report


def report(step: int, value: float = 1.0) -> Report:
    return Report(
        step, {"fd": value, "eval_seconds": 0.5}, f"checkpoints/{step:08d}", f"grids/{step:08d}.png"
    )


def test_a_file_that_is_not_there_holds_no_reports(tmp_path: Path):
    assert ReportFile(tmp_path / "reports.jsonl").read() == []


def test_reports_come_back_as_they_were_appended(tmp_path: Path):
    file = ReportFile(tmp_path / "new folder" / "reports.jsonl")
    values = [0.1, 1 / 3, 1e-300, 12345.678901234567]
    for step, value in enumerate(values):
        file.append(report(step, value))
    assert file.read() == [report(step, value) for step, value in enumerate(values)]
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["reports.jsonl"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_torn_line_counts_as_never_written(tmp_path: Path, cut: int):
    path = tmp_path / "reports.jsonl"
    path.unlink(missing_ok=True)
    file = ReportFile(path)
    for step in (1, 2, 3):
        file.append(report(step))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    read = file.read()
    assert read == [report(1), report(2), report(3)][: whole[:cut].count(b"\n")]
    file.append(report(9))
    assert file.read() == [*read, report(9)]


def test_a_report_replaces_those_of_its_own_and_later_steps(tmp_path: Path):
    file = ReportFile(tmp_path / "reports.jsonl")
    for step in (0, 10, 20, 30):
        file.append(report(step))
    file.append(report(20, 7.0))
    assert file.read() == [report(0), report(10), report(20, 7.0)]


def test_the_best_report_is_the_earliest_of_the_lowest():
    reports = [report(10, 3.0), report(20, 1.0), report(30, 1.0), report(40, 2.0)]
    assert best_report(reports, "fd") == reports[1]


def test_an_untrained_model_is_never_the_best():
    assert best_report([report(0, 0.0), report(10, 3.0)], "fd") == report(10, 3.0)
    assert best_report([report(0, 0.0)], "fd") is None


def test_reports_of_another_metric_are_not_compared():
    assert best_report([report(10, 3.0)], "fid_10k") is None
