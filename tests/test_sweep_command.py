"""The sweep's command line: what a wrong file, a wrong word and a plan look like to the user."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_yaml import CASES, GOOD

# Runs every broken file through the command, in one process: what it prints, and whether Ray was loaded.
_RUN_ALL = """
import contextlib, io, json, sys, time
from dtr_ray.sweep import main
answers = []
for path in json.load(sys.stdin):
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([path])
    answers.append([code, out.getvalue(), err.getvalue(), time.perf_counter() - started])
print(json.dumps({"answers": answers, "loaded": [n for n in ("ray", "torch") if n in sys.modules]}))
"""


def test_every_broken_file_exits_2_with_one_line_and_starts_nothing(tmp_path: Path) -> None:
    paths = []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(str(case.write(folder)))
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL], input=json.dumps(paths), capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["loaded"] == []
    assert len(result["answers"]) >= 60
    for case, path, (code, out, err, seconds) in zip(CASES, paths, result["answers"], strict=True):
        place = f"error: {path}:{case.line}: " if case.line else f"error: {path}"
        assert code == 2, case.name
        assert out == "", case.name
        assert err.startswith(place), (case.name, err)
        assert len(err.splitlines()) == 1, (case.name, err)
        assert all(words in err for words in case.words), (case.name, err)
        assert seconds < 5, case.name


def test_a_fresh_process_answers_a_typo_in_under_5_seconds(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(GOOD.replace("num_steps: 100", "num_step: 100"))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dtr_ray.sweep", str(path)], capture_output=True, text=True, check=False
    )
    assert time.perf_counter() - started < 5
    assert done.returncode == 2
    assert "trial.training.num_step: unknown key; did you mean num_steps?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trials", "many"], "--trials"),
        (["--set", "routing.alhpa=4"], "did you mean"),
        (["--set", "trial.training.lr=-1"], "training.lr"),
        (["--no-such-option"], "--no-such-option"),
        (["--resume", "--trials", "0"], "search.num_trials"),
    ],
)
def test_a_wrong_word_exits_2_with_one_line(words: list[str], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "dtr_ray.sweep", str(path), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_tells_the_plan_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "dtr_ray.sweep", str(path), "--dry-run", "--trials", "7"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for words in (
        "7 trials",
        "routing.alpha",
        "weighting.name is min_snr",
        "ASHA",
        "700 at most",
        "side by side",
    ):
        assert words in done.stdout, words
    assert list(tmp_path.iterdir()) == [path]
