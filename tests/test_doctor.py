"""The doctor as a command: its lines, its exit codes, and that it always ends."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_sweeps import ROOT, tiny_sweep

from dtr_ray.doctor import main

LINE = re.compile(r"(ok      |warning |fail    ) [a-z]+ +\S.*")


def lines_of(text: str) -> list[str]:
    *lines, empty, last = text.splitlines()
    assert empty == ""
    assert re.fullmatch(r"\d+ failed, \d+ warnings, \d+ ok", last)
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    for line in lines:
        assert ("; to mend: " in line) == (not line.startswith("ok")), line
    return lines


def write(folder: Path, **changes: object) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(tiny_sweep(folder / "runs", **changes).to_dict()))
    return path


def test_a_machine_that_is_well_gets_0_without_a_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--address", "local", "--output", str(tmp_path / "runs")]
    assert main(words) == 0
    lines = lines_of(capsys.readouterr().out)
    assert not [line for line in lines if line.startswith("fail")]
    assert any(line.startswith("ok       storage") and str(tmp_path) in line for line in lines)
    assert main([str(write(tmp_path)), *words]) == 0
    more = lines_of(capsys.readouterr().out)
    assert {"room", "data"} <= {line.split()[1] for line in more}
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_a_check_that_fails_gets_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "runs").write_text("a file, no folder")
    assert main([str(write(tmp_path)), "--address", "local"]) == 1
    lines = lines_of(capsys.readouterr().out)
    (storage,) = [line for line in lines if line.split()[1] == "storage"]
    assert storage.startswith("fail     storage")
    assert storage.endswith("such as one on NFS")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.yaml"], "none.yaml"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--set", "routing.alpha=4"], "no file is named"),
        (["--no-such"], "--no-such"),
    ],
)
def test_what_the_user_types_wrong_gets_2_and_one_line(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_it_ends_though_the_cluster_takes_the_call_and_never_speaks(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        words = ["--address", address, "--timeout", "4", "--output", str(tmp_path / "runs")]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "dtr_ray.doctor", *words], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100, check=False,
        )  # fmt: skip
    assert time.monotonic() - started < 60
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = lines_of(done.stdout)
    (ray,) = [line for line in lines if line.split()[:2] == ["fail", "ray"]]
    assert f"{address} cannot be joined: did not end within 4 s" in ray
    assert any(line.startswith("ok       storage") for line in lines)
