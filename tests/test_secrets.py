"""Secrets stay where they are: in no plan, file, message or record; and nothing that is read can run."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_trials import METRIC, TINY

from dtr_ray import sweep
from dtr_ray.config import SweepConfig
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.training.reports import Report

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dtr_ray"
SECRET = "s3cr3t-planted-word"
VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DTR_RAY_STUDY_PASSWORD", "PGPASSWORD", "HF_TOKEN",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip
ADDRESS = f"http://user:{SECRET}@127.0.0.1:1"
STUDY = f"postgresql://user:{SECRET}@127.0.0.1:1/db"
# Of Python, what loads by running: each with the one place that may, and why.
UNSAFE = {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads",
          "joblib.load", "marshal.loads", "marshal.load", "shelve.open", "yaml.load", "yaml.unsafe_load",
          "yaml.full_load", "os.system", "os.popen", "eval", "exec", "extractall",
          "unpack_archive"}  # fmt: skip
ALLOWED = {
    # The error of a trial's process, written a moment ago by Ray for this driver.
    ("service/deaths.py", "cloudpickle.loads"),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)


def sweep_config(folder: Path) -> SweepConfig:
    values = {
        "name": "tiny",
        "trial": TINY,
        "space": {"routing.alpha": {"type": "uniform", "low": 1.0, "high": 8.0}},
        "storage": {"output": str(folder / "out")},
        "tracking": {"uri": ADDRESS},
    }
    return SweepConfig.from_dict(values)


def holders(folder: Path) -> list[str]:
    """Files that hold the secret."""
    found = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    return [path.relative_to(folder).as_posix() for path in found]


def write(config: SweepConfig, folder: Path, study: str | None = None) -> Path:
    values = config.to_dict()
    values["storage"]["study"] = study
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.usefixtures("planted")
def test_a_plan_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(sweep_config(tmp_path), tmp_path, STUDY)
    assert sweep.main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "127.0.0.1:1" in printed.out
    assert SECRET not in printed.out + printed.err
    assert holders(tmp_path) == ["space.yaml"]


@pytest.mark.usefixtures("planted")
def test_what_a_sweep_keeps_holds_no_secret(tmp_path: Path):
    config = sweep_config(tmp_path)
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    save_config(config, folder)
    state = SweepState(config, folder)
    trial = state.next_trial()
    assert not isinstance(trial, str)
    state.report(trial.trial_id, Report(6, {METRIC: 1.0}, "checkpoints/00000006", ""))
    state.finish(trial.trial_id, "completed")
    state.close()
    assert (folder / "sweep.json").is_file()
    assert holders(tmp_path) == []


def run_command(folder: Path, *words: str, **environment: str) -> str:
    """What a command prints that fails on the address with the secret."""
    env = {**os.environ, **dict.fromkeys(VARIABLES, SECRET), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert result.returncode == 2, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    "words", [("dtr_ray.evaluate", "runs:/0"), ("dtr_ray.train_best", "--experiment", "tiny")]
)
@pytest.mark.slow
def test_an_error_of_mlflow_shows_no_secret(words: tuple[str, ...], tmp_path: Path):
    printed = run_command(tmp_path, *words, MLFLOW_TRACKING_URI=ADDRESS)
    assert "MLflow at http://" in printed
    assert SECRET not in printed
    assert holders(tmp_path) == []


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Dotted names of all that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), None)


def faults(path: Path) -> Iterator[str]:
    """Calls in a module that could run what they read."""
    place = path.relative_to(PACKAGE).as_posix()
    for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        last = name.rpartition(".")[2]
        if name == "torch.load" and keyword(call, "weights_only") != "True":
            yield f"{place}:{call.lineno}: torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") != "False":
            yield f"{place}:{call.lineno}: np.load without allow_pickle=False"
        if keyword(call, "shell") == "True" or keyword(call, "trust_remote_code") == "True":
            yield f"{place}:{call.lineno}: {name} runs what it is given"
        if (name in UNSAFE or last in ("extractall", "unpack_archive")) and (place, name) not in ALLOWED:
            yield f"{place}:{call.lineno}: {name}"


def test_nothing_that_the_package_reads_can_run_code():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    assert [fault for path in modules for fault in faults(path)] == []


@pytest.mark.parametrize(
    "line", ["torch.load(p)", "np.load(p)", "pickle.loads(b)", "yaml.load(t)", "tar.extractall(d)", "eval(t)"]
)
def test_a_call_that_could_is_found(line: str):
    tree = ast.parse(line)
    name, call = next(calls(tree))
    unsafe = name in UNSAFE or name.rpartition(".")[2] == "extractall"
    assert unsafe or keyword(call, "weights_only") is None
