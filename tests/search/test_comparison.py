"""Comparing methods over seeds: the figures are the textbook's, and like is compared with like."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_sweeps import METRIC, tiny_sweep

from dtr_ray.config.protocol import protocol_of
from dtr_ray.search.comparison import compare_sweeps, compare_trials
from dtr_ray.search.comparison_table import comparison_table, write_comparison
from dtr_ray.search.journal import Journal
from dtr_ray.search.state import save_config

SPACE: dict[str, Any] = {
    "training.seed": {"type": "choice", "values": [0, 1, 2, 3]},
    "routing.name": {"type": "choice", "values": ["none", "random", "dtr"]},
    "routing.beta": {"type": "choice", "values": [0.5, 0.8], "when": {"routing.name": "dtr"}},
}
NONE = {"routing.name": "none"}
RANDOM = {"routing.name": "random"}
DTR = {"routing.name": "dtr", "routing.beta": 0.8}


class Written:
    """A sweep's folder whose journal says what a test wants; values are those of steps 10, 20, ..."""

    def __init__(self, root: Path, space: dict[str, Any]) -> None:
        config = tiny_sweep(root, space=space, early_stopping={"name": "none"})
        self.folder = root / config.name
        self.folder.mkdir()
        save_config(config, self.folder)
        self.journal = Journal(self.folder / "journal.jsonl")
        self.journal.write("start")
        self.number = 0

    def trial(
        self,
        params: dict[str, Any],
        seed: int | None,
        *values: float,
        status: str = "completed",
        metric: str = METRIC,
        protocol: dict[str, Any] | None = None,
    ) -> None:
        name = f"t{self.number:04d}"
        params = params if seed is None else params | {"training.seed": seed}
        self.journal.write("trial", id=name, number=self.number, params=params)
        for step, value in enumerate(values, 1):
            figures = {METRIC: 1.0, "eval_seconds": 1.0, metric: value}
            stop = "too high" if status == "pruned" and step == len(values) else None
            event = {"metrics": figures, "checkpoint": "", "wall_s": 1.0, "stop": stop}
            event |= {} if protocol is None else {"protocol": protocol}
            self.journal.write("report", id=name, step=10 * step, **event)
        if status in ("completed", "failed"):
            self.journal.write("end", id=name, status=status, reason="", wall_s=1.0)
        self.number += 1


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path, SPACE)


@pytest.fixture
def three(written: Written) -> Written:
    """none: 30, 32, 34 and 40 on seeds 0 to 3; dtr 28, 31, 33 on seeds 0 to 2; random 50 on seed 0."""
    for seed, value in enumerate((30.0, 32.0, 34.0, 40.0)):
        written.trial(NONE, seed, 99.0, value, value + 1)
    for seed, value in enumerate((28.0, 31.0, 33.0)):
        written.trial(DTR, seed, value)
    written.trial(RANDOM, 0, 50.0)
    return written


def text_of(comparison: Any) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(comparison_table(comparison))
    return console.file.getvalue()


def test_trials_that_differ_in_their_seed_alone_are_one_row(three: Written):
    rows = compare_trials(three.folder).rows
    assert [row.params for row in rows] == [DTR, NONE, RANDOM]
    assert [len(row.all_values) for row in rows] == [3, 4, 1]
    assert rows[1].mean == pytest.approx(34.0)
    assert rows[1].error == pytest.approx(statistics.stdev([30, 32, 34, 40]) / 2)
    assert rows[2].error is None


def test_differences_are_paired_by_seed(three: Written):
    dtr, none, random = compare_trials(three.folder, baseline=NONE).rows
    assert none.difference is None
    assert dtr.difference is not None
    # -2, -1, -1: the baseline's fourth seed has no partner.
    assert dtr.difference.mean == pytest.approx(-4 / 3)
    assert dtr.difference.error == pytest.approx(statistics.stdev([-2, -1, -1]) / math.sqrt(3))
    assert dtr.difference.num_pairs == 3
    assert random.difference is not None
    assert (random.difference.mean, random.difference.error, random.difference.num_pairs) == (20, None, 1)


def test_without_common_seeds_the_means_are_compared(written: Written):
    for seed, value in ((0, 10.0), (1, 12.0)):
        written.trial(NONE, seed, value)
    for seed, value in ((2, 20.0), (3, 26.0)):
        written.trial(DTR, seed, value)
    row = compare_trials(written.folder, baseline=NONE).rows[1]
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(12)
    assert row.difference.error == pytest.approx(math.hypot(1, 3))
    assert row.difference.num_pairs == 0


def test_a_sweep_without_seeds_has_a_row_a_trial(tmp_path: Path):
    space = {key: value for key, value in SPACE.items() if key != "training.seed"}
    written = Written(tmp_path, space)
    written.trial(NONE, None, 10.0)
    written.trial(DTR, None, 9.0)
    dtr, none = compare_trials(written.folder, baseline=NONE).rows
    assert (dtr.mean, dtr.error, none.mean) == (9, None, 10)
    assert dtr.difference is not None
    assert (dtr.difference.mean, dtr.difference.error, dtr.difference.num_pairs) == (-1, None, 0)


def test_only_completed_trials_count_and_the_others_are_told(three: Written):
    three.trial(DTR, 3, 1.0, status="pruned")
    three.trial(DTR, 4, 1.0, status="failed")
    three.trial(DTR, 5, 1.0, status="running")
    three.trial({"routing.name": "dtr", "routing.beta": 0.5}, 0, status="running")
    comparison = compare_trials(three.folder, baseline=NONE)
    dtr = comparison.rows[0]
    assert dtr.all_values == [28, 31, 33]
    assert "3 completed, 1 stopped early, 1 failed, 1 running" in text_of(comparison)
    # What has no value yet is last.
    assert comparison.rows[-1].mean is None
    assert comparison.rows[-1].difference is None


def test_the_last_value_instead_of_the_best(three: Written):
    assert compare_trials(three.folder, at="last").rows[1].mean == pytest.approx(35)


def test_a_metric_that_is_better_the_higher_is_ranked_so(written: Written):
    for seed in (0, 1):
        written.trial(NONE, seed, 3.0, 5.0, 4.0, metric="is_32")
        written.trial(DTR, seed, 6.0, 2.0, metric="is_32")
    rows = compare_trials(written.folder, "is_32").rows
    assert [(row.params["routing.name"], row.mean) for row in rows] == [("dtr", 6), ("none", 5)]
    assert "The higher the better" in text_of(compare_trials(written.folder, "is_32"))


def test_the_untrained_model_is_no_result(written: Written):
    written.trial(NONE, 0, 10.0)
    event = {"metrics": {METRIC: 0.5}, "checkpoint": "", "wall_s": 1.0, "stop": None}
    written.journal.write("report", id="t0000", step=0, **event)
    assert compare_trials(written.folder).rows[0].mean == 10


def test_the_table_has_every_row(three: Written):
    text = text_of(compare_trials(three.folder, baseline=NONE))
    lines = [line.split() for line in text.splitlines()]
    assert ["dtr", "0.8", "30.67", "1.5", "3", "-1.33", "±", "0.33", "3", "3", "completed"] in lines
    assert ["none", "34", "2.2", "4", "baseline", "4", "completed"] in lines
    assert ["random", "50", "1", "+16", "1", "1", "completed"] not in lines
    assert ["random", "50", "1", "+20", "1", "1", "completed"] in lines


def test_the_files_have_every_digit_and_a_markdown_table(three: Written):
    comparison = compare_trials(three.folder, baseline=NONE)
    paths = write_comparison(comparison, three.folder)
    assert [path.name for path in paths] == ["compare.csv", "compare.md"]
    with paths[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["routing.name"], row["routing.beta"]) for row in rows] == [
        ("dtr", "0.8"), ("none", ""), ("random", ""),
    ]  # fmt: skip
    assert float(rows[0]["mean"]) == statistics.fmean([28, 31, 33])
    assert float(rows[0]["difference"]) == pytest.approx(-4 / 3)
    assert [row["n"] for row in rows] == ["3", "4", "1"]
    assert [row["baseline"] for row in rows] == ["0", "1", "0"]
    assert rows[1]["difference"] == rows[2]["standard_error"] == ""
    lines = paths[1].read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert {line.count("|") for line in table} == {9}
    assert table[1].replace(" ", "") == "|" + "---|" * 8
    assert [file.name for file in three.folder.glob("*.tmp")] == []


def test_without_a_baseline_there_are_no_differences(three: Written):
    assert "pairs" not in text_of(compare_trials(three.folder))


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"routing.nam": "none"}, "--baseline routing.nam is not searched; did you mean routing.name"),
        ({"training.seed": 0}, "--baseline training.seed is not searched"),
        ({"routing.name": "non"}, "no trial has it; there are routing.name: dtr, none, random"),
        ({"routing.name": "dtr"}, r"fits 2 rows \(.*beta 0.8.*\): name more parameters"),
    ],
)
def test_a_baseline_that_is_not_one_row_is_refused(three: Written, baseline: dict[str, Any], message: str):
    three.trial({"routing.name": "dtr", "routing.beta": 0.5}, 0, 40.0)
    with pytest.raises(ValueError, match=message):
        compare_trials(three.folder, baseline=baseline)


def test_an_unknown_metric_is_told_with_those_there_are(three: Written):
    with pytest.raises(ValueError, match=rf"no trial has reported a metric 'fid'; .*{METRIC}"):
        compare_trials(three.folder, "fid")


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not the folder of a sweep"):
        compare_trials(tmp_path)


def test_a_sweep_that_has_reported_nothing_is_told(written: Written):
    with pytest.raises(ValueError, match="no trial has reported anything yet"):
        compare_trials(written.folder)


def test_a_running_sweep_is_left_as_it_is(three: Written):
    before = (three.folder / "journal.jsonl").read_bytes()
    with (three.folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "trial", "id": "t9')
    compare_trials(three.folder)
    assert (three.folder / "journal.jsonl").read_bytes().startswith(before)
    assert (three.folder / "journal.jsonl").read_bytes().endswith(b"t9")
    json.loads(before.splitlines()[-1])


def test_trials_of_two_protocols_are_refused_with_what_differs(written: Written, tmp_path: Path):
    trial = tiny_sweep(tmp_path).trial
    written.trial(NONE, 0, 10.0, protocol=protocol_of(trial, "digits-8-a"))
    written.trial(DTR, 0, 9.0, protocol=protocol_of(trial, "digits-8-b"))
    with pytest.raises(
        ValueError, match=r"2 protocols.*data\.identity is 'digits-8-b', not 'digits-8-a'"
    ) as error:
        compare_trials(written.folder)
    assert "--mixed" in str(error.value)
    none, dtr = compare_sweeps([written.folder], mixed=True)
    assert [(row.params, row.mean) for row in none.rows] == [(NONE, 10)]
    assert [(row.params, row.mean) for row in dtr.rows] == [(DTR, 9)]
    assert "(digits-8-a)" in text_of(none)
    # The baseline is in one of the tables: there are no differences across them.
    none, dtr = compare_sweeps([written.folder], baseline=NONE, mixed=True)
    assert none.baseline is none.rows[0]
    assert (dtr.baseline, dtr.rows[0].difference) == (None, None)
    with pytest.raises(ValueError, match="no trial has it"):
        compare_sweeps([written.folder], baseline={"routing.name": "x"}, mixed=True)
    with write_comparison([none, dtr], written.folder)[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ["digits-8-a" in row["protocol"] for row in rows] == [True, False]


def test_records_from_before_protocols_were_kept_are_told_and_not_mixed_with_others(
    written: Written, tmp_path: Path
):
    written.trial(NONE, 0, 10.0)
    assert "Measured: unknown protocol" in text_of(compare_trials(written.folder))
    written.trial(DTR, 0, 9.0, protocol=protocol_of(tiny_sweep(tmp_path).trial))
    with pytest.raises(ValueError, match="one of them is of an unknown protocol"):
        compare_trials(written.folder)


def test_sweeps_are_compared_where_their_protocol_is_one(three: Written, tmp_path: Path):
    (tmp_path / "other").mkdir()
    other = Written(tmp_path / "other", SPACE)
    other.trial(NONE, 0, 29.0)
    (table,) = compare_sweeps([three.folder, other.folder])
    assert [row.params["sweep"] for row in table.rows].count(str(other.folder)) == 1
    assert {row.params["routing.name"]: row.mean for row in table.rows[:2]} == {
        "none": 29.0,
        "dtr": pytest.approx(92 / 3),
    }
    assert "sweep" in text_of(table)
    one = {"sweep": str(other.folder)}
    assert compare_sweeps([three.folder, other.folder], baseline=one)[0].baseline is not None


def test_sweeps_of_other_metrics_are_not_compared(three: Written, tmp_path: Path):
    (tmp_path / "other").mkdir()
    other = Written(tmp_path / "other", SPACE)
    save_config(tiny_sweep(tmp_path / "other", trial__evaluation__num_samples=40), other.folder)
    other.trial(NONE, 0, 29.0, metric="fd_efficientnet_lite0_40")
    with pytest.raises(ValueError, match="2 protocols"):
        compare_sweeps([three.folder, other.folder])
    tables = compare_sweeps([three.folder, other.folder], mixed=True)
    assert {table.metric for table in tables} == {METRIC, "fd_efficientnet_lite0_40"}
