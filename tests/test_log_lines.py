"""Lines for machines: everything that a command says is one JSON object a line; else nothing changes."""

import io
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dtr_ray import log_lines
from dtr_ray.command import run_command
from dtr_ray.log_lines import LineStream, about, always, chosen, follow, lines

ROOT = Path(__file__).parents[1]


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(list(line)[:3] == ["time", "level", "message"] for line in found)
    return found


def test_prints_warnings_and_logs_are_lines_with_what_they_are_about(capsys: pytest.CaptureFixture[str]):
    def command() -> int:
        always(sweep="flowers")
        with about(trial="t0003", step=20, value=float("nan"), metric=None):
            print("[0:12] t0003", "50%")
            logging.getLogger("dtr_ray.service.tracking").warning("MLflow is %s", "away")
        print("warning: early_stopping has no effect", file=sys.stderr)
        print("weights: fetched", file=sys.stderr)
        chosen("yaml")
        return 0

    assert run_command(command, log_format="json") == 2
    out, err = capsys.readouterr()
    (said,) = objects(out)
    assert (said["message"], said["level"]) == ("[0:12] t0003 50%", "INFO")
    assert (said["sweep"], said["trial"], said["step"]) == ("flowers", "t0003", 20)
    assert said["value"] == "nan"
    assert "metric" not in said
    assert said["time"].endswith("Z")
    logged, warned, printed, failed = objects(err)
    assert (logged["message"], logged["level"]) == ("MLflow is away", "WARNING")
    assert (logged["logger"], logged["trial"]) == ("dtr_ray.service.tracking", "t0003")
    assert (warned["message"], warned["level"]) == ("warning: early_stopping has no effect", "WARNING")
    assert (printed["message"], printed["level"]) == ("weights: fetched", "INFO")
    assert (failed["message"], failed["level"]) == ("error: DTR_RAY_LOG is text or json, not 'yaml'", "ERROR")
    assert "trial" not in failed


def test_an_error_of_ours_is_one_line_with_its_traceback(capsys: pytest.CaptureFixture[str]):
    def command() -> int:
        raise RuntimeError("lost")

    with pytest.raises(SystemExit) as ended:
        run_command(command, log_format="json")
    assert ended.value.code == 1
    (line,) = objects(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("CRITICAL", "RuntimeError: lost")
    assert 'raise RuntimeError("lost")' in line["traceback"]


def test_text_stays_as_it_is_and_nothing_is_left_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def command() -> int:
        with about(trial="t0001"):
            print("[0:01] t0001 starts")
        return 0

    monkeypatch.delenv(log_lines.VARIABLE, raising=False)
    streams = sys.stdout, sys.stderr
    assert run_command(command, log_format=None) == 0
    assert capsys.readouterr().out == "[0:01] t0001 starts\n"
    monkeypatch.setenv(log_lines.VARIABLE, "json")
    assert run_command(command) == 0
    assert capsys.readouterr().out == "[0:01] t0001 starts\n"
    assert run_command(command, log_format=None) == 0
    assert objects(capsys.readouterr().out)[0]["trial"] == "t0001"
    assert (sys.stdout, sys.stderr) == streams
    assert log_lines.os.environ[log_lines.VARIABLE] == "json"
    monkeypatch.setenv(log_lines.VARIABLE, "xml")
    assert run_command(command, log_format=None) == 2
    assert capsys.readouterr().err == "error: DTR_RAY_LOG is text or json, not 'xml'\n"
    assert chosen("text") == "text"


def test_threads_do_not_mix_their_lines_or_what_they_are_about():
    below = io.StringIO()
    stream = LineStream(below)

    def say(number: int) -> None:
        with about(trial=f"t{number}"):
            for step in range(50):
                stream.write(f"of {number} ")
                stream.write(f"step {step}\n\n")

    threads = [threading.Thread(target=say, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = objects(below.getvalue())
    assert len(found) == 200
    for line in found:
        assert line["message"].split()[1] == line["trial"].removeprefix("t")


def test_a_process_of_rays_follows_the_command(monkeypatch: pytest.MonkeyPatch):
    code = """
import logging, sys
from dtr_ray.log_lines import always, follow
log = logging.getLogger("dtr_ray.service.worker")
for trial in ("t0001", "t0002"):
    follow(sys.argv[1], trial=trial)
    always(step=7)
    log.info("evaluated")
    print("hello")
log.warning("slow")
"""

    def said(word: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, word], capture_output=True, text=True, cwd=ROOT, check=True
        )
        return done.stdout, done.stderr

    out, err = said("json")
    assert [(line["trial"], line["step"]) for line in objects(out)] == [("t0001", 7), ("t0002", 7)]
    assert [line["message"] for line in objects(err)] == ["evaluated", "evaluated", "slow"]
    assert said("text") == ("hello\nhello\n", "slow\n")


def test_lines_can_be_nested_in_a_test_and_follow_changes_nothing_for_text():
    before = sys.stderr
    with lines("text"):
        follow("text", trial="t0000")
        assert sys.stderr is before
