"""A whole sweep that speaks to machines."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tiny_sweeps import METRIC, folder_of, records, sweep_command, tiny_sweep


@pytest.mark.slow
def test_all_that_a_sweep_says_is_json_and_its_trials_log_as_it_does(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, search__num_trials=3)
    # Ray's sockets need a short path.
    with TemporaryDirectory(prefix="r") as rays:
        with sweep_command(config, "--log-format", "json", RAY_TMPDIR=rays) as command:
            assert command.wait() == 0, command.output
            lines = [json.loads(line) for line in command.output.splitlines()]
        logged = [
            json.loads(line)
            for path in Path(rays).glob("ray/session_2*/logs/worker-*.err")
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("{")
        ]
    trials = records(folder_of(config))
    assert {line["sweep"] for line in lines if line["time"]} == {"tiny"}
    told = {
        (line["trial"], line["step"]): line["value"]
        for line in lines
        if line.get("event") == "reported" and line["metric"] == METRIC
    }
    assert told == {(t.trial_id, step): v[METRIC] for t in trials.values() for step, v in t.reports.items()}
    ended = {line["trial"]: line["status"] for line in lines if line.get("event") == "ended"}
    assert ended == {t.trial_id: t.status for t in trials.values()}
    assert any(line["message"].startswith("results ") for line in lines)
    evaluated = {
        (line["trial"], line["step"]): line[METRIC] for line in logged if line["message"] == "evaluated"
    }
    assert evaluated == told
    assert {line["sweep"] for line in logged} == {"tiny"}
