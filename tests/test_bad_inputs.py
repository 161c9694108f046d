"""Bad inputs of every kind end in one clear line: no traceback, nothing written elsewhere, no code run."""

import contextlib
import importlib
import io
import random
import shutil
import warnings
import zlib
from pathlib import Path

import pytest
from bad_inputs import CANARY, NO_RAY, Case, build_ground, cases
from tiny_sweeps import snapshot

CASES = cases()
_MAY_CHANGE = ("out", "run", "cache", "home")
"""The output folder of a case, that of a run which goes on, and caches."""


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files of every kind."""
    return build_ground(tmp_path_factory.mktemp("bad") / "ground")


def run_case(
    case: Case, ground: Path, root: Path, patch: pytest.MonkeyPatch
) -> tuple[int, str, str, list[str]]:
    """Exit code, what went to stdout and stderr, and the files that it changed where it must not."""
    inside = root / "surroundings" / "here"
    inside.mkdir(parents=True)
    for name in case.needs:
        source = ground / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, inside / name)
    case.spoil(inside, random.Random(zlib.crc32(case.name.encode())))
    patch.chdir(inside)
    for name, value in {"RAY_ADDRESS": NO_RAY, "HOME": str(inside / "home"), **case.environment}.items():
        patch.setenv(name, value)
    before = snapshot(root)
    out, err = io.StringIO(), io.StringIO()
    command = importlib.import_module(f"dtr_ray.{case.command[0]}")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            code = command.main(list(case.command[1:]))
        except SystemExit as error:
            code = int(error.code or 0)
    after = snapshot(root)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    allowed = tuple(f"surroundings/here/{name}" for name in _MAY_CHANGE)
    return code, out.getvalue(), err.getvalue(), [name for name in changed if not name.startswith(allowed)]


def problems(
    case: Case, code: int, out: str, err: str, changed: list[str], log: str, root: Path
) -> list[str]:
    """What a case has done wrong."""
    found = []
    text = "\n".join([out, err, log])
    if code not in case.codes:
        found.append(f"exit code {code}")
    if "Traceback" in text:
        found.append("a traceback")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if code and len(errors) != 1:
        found.append(f"{len(errors)} lines of errors")
    said = text if code == 0 else err
    if not any(word in said for word in case.says):
        found.append(f"says none of {case.says}")
    if any(len(line) > 1500 for line in err.splitlines()):
        found.append("a line without end")
    if changed:
        found.append(f"changed {changed}")
    if any(root.rglob(CANARY)):
        found.append("ran a pickle")
    return found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in CASES],
)
def test_a_bad_input_ends_in_one_clear_line(
    case: Case,
    ground: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    ended = run_case(case, ground, tmp_path, monkeypatch)
    assert problems(case, *ended, caplog.text, tmp_path) == [], ended


def test_there_are_at_least_300_of_them():
    assert len(CASES) >= 300
