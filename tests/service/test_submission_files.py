"""What a submitted sweep takes along, what it leaves at home, and what is refused before anything is sent."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_sweeps import tiny_sweep

from dtr_ray import sweep
from dtr_ray.config.read import read_sweep
from dtr_ray.service import submission_files
from dtr_ray.service.submission_files import check_shippable, job_environment, not_sent, pack

SECRET = "s3cr3t-planted-word"
STUDY = f"postgresql://user:{SECRET}@10.0.0.1/db"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command is typed."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def packed(config: Any, tmp_path: Path) -> dict[str, Path]:
    target = tmp_path / "sent"
    target.mkdir()
    pack(config, target)
    return {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}


def test_code_and_resolved_file_and_named_files_go_and_nothing_else(home: Path, tmp_path: Path):
    for name in (".env", ".git/config", ".venv/bin/python", "data/0.png", "runs/old/best.json", "notes.txt"):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)
    weights = home / "weights" / "inception.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    config = tiny_sweep(
        Path("/mnt/shared/runs"),
        metric=None,
        trial__evaluation__features="inception",
        trial__evaluation__feature_weights="weights/inception.pt",
    )
    check_shippable(config)
    files = packed(config, tmp_path)
    others = {name for name in files if not name.startswith("dtr_ray/")}
    assert others == {"tiny.resolved.yaml", "weights/inception.pt"}
    assert files["weights/inception.pt"].read_bytes() == b"weights"
    package = Path(sweep.__file__).parent
    code = {f"dtr_ray/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    assert code <= files.keys()
    assert not [name for name in files if "__pycache__" in name]


def test_the_file_that_is_sent_says_the_same(home: Path, tmp_path: Path):
    config = tiny_sweep(Path("/mnt/shared/runs"))
    assert read_sweep(packed(config, tmp_path)["tiny.resolved.yaml"]) == config


def test_what_is_too_large_is_refused_with_its_largest_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (home / "big.pt").write_bytes(bytes(5 * 2**20))
    monkeypatch.setattr(submission_files, "MAX_BYTES", 4 * 2**20)
    config = tiny_sweep(
        Path("/mnt/runs"),
        metric=None,
        trial__evaluation__features="inception",
        trial__evaluation__feature_weights="big.pt",
    )
    with pytest.raises(
        ValueError, match=r"the files are \d MiB, and at most 4 can be sent: put big.pt \(5 MiB"
    ):
        packed(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"storage__output": "runs"}, "storage.output is 'runs'"),
        ({"storage__output": "~/runs"}, "storage.output is '~/runs'"),
        ({"storage__study": STUDY}, "storage.study holds a password"),
        ({"tracking__uri": f"http://user:{SECRET}@mlflow:5000"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"storage__output": f"s3://key:{SECRET}@bucket/runs"}, "storage.output holds a password"),
        ({"trial__data": {"name": "folder", "path": "data", "resolution": 8}}, "trial.data.path is 'data'"),
        (
            {
                "metric": None,
                "trial__evaluation__features": "inception",
                "trial__evaluation__feature_weights": "none.pt",
            },
            "'none.pt' does not exist",
        ),
        (
            {
                "metric": None,
                "trial__evaluation__features": "inception",
                "trial__evaluation__feature_weights": "../over.pt",
            },
            "'../over.pt' is not in the current folder",
        ),
    ],
)
def test_what_cannot_work_there_is_refused_here(home: Path, changes: dict[str, Any], words: str):
    (home.parent / "over.pt").write_bytes(b"")
    config = tiny_sweep(**{"output": Path("/mnt/shared/runs"), **changes})
    with pytest.raises(ValueError) as error:
        check_shippable(config)
    assert words in str(error.value)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_clusters_own_paths_are_not_looked_for_here(home: Path):
    data = {"name": "folder", "path": "/mnt/only/there", "resolution": 8}
    check_shippable(tiny_sweep(Path("/mnt/shared/runs"), trial__data=data))
    intervals = {"name": "affinity", "from": "/mnt/only/there.npz"}
    check_shippable(
        tiny_sweep(
            Path("/mnt/shared/runs"),
            trial__weighting={"name": "ant_uw", "intervals": intervals},
            space={"routing.alpha": {"type": "uniform", "low": 1, "high": 2}},
        )
    )


def test_of_the_environment_only_what_means_the_same_there_and_is_no_secret_goes_along():
    config = tiny_sweep(Path("/mnt/shared/runs"))
    here = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "DTR_RAY_STUDY_PASSWORD": SECRET,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "DTR_RAY_CACHE": "/mnt/cache",
        "DTR_RAY_OFFLINE": "1",
        "DTR_RAY_MIRROR": f"https://me:{SECRET}@mirror",
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
    }
    sent = {"DTR_RAY_OFFLINE": "1", "MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
    assert job_environment(config, here) == sent
    for uri in (
        "http://localhost:5000",
        "http://127.0.0.1",
        "sqlite:///runs/mlflow.db",
        f"http://a:{SECRET}@b",
    ):
        assert job_environment(config, {"MLFLOW_TRACKING_URI": uri}) == {}
        (sentence,) = not_sent(config, {"MLFLOW_TRACKING_URI": uri})
        assert SECRET not in sentence
    own = tiny_sweep(Path("/mnt/shared/runs"), tracking__uri="https://other")
    assert job_environment(own, here) == {"DTR_RAY_OFFLINE": "1"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--submit"],
        ["--attach", "a", "--stop", "b"],
        ["space.yaml", "--list"],
        ["--stop", "a", "--resume"],
        ["space.yaml", "--submit", "--attach", "a"],
    ],
)
def test_options_that_do_not_go_together_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_is_wrong_is_told_before_anybody_is_asked(home: Path, capsys: pytest.CaptureFixture[str]):
    values = tiny_sweep(Path("runs")).to_dict()
    (home / "space.yaml").write_text(yaml.safe_dump(values))
    for words, expected in (
        (["--set", f"storage.study={STUDY}", "--output", "/mnt/runs"], "storage.study holds a password"),
        ([], "storage.output is 'runs'"),
        (["--set", "routing.alhpa=4"], "did you mean"),
    ):
        assert sweep.main(["space.yaml", "--address", "http://127.0.0.1:1", *words]) == 2
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert expected in errors[0]
        assert SECRET not in printed.out + printed.err


def test_a_plan_for_a_cluster_asks_nobody(home: Path, capsys: pytest.CaptureFixture[str]):
    (home / "space.yaml").write_text(yaml.safe_dump(tiny_sweep(Path("/mnt/shared/runs")).to_dict()))
    assert sweep.main(["space.yaml", "--address", "http://127.0.0.1:1", "--dry-run"]) == 0
    assert "/mnt/shared/runs/tiny" in capsys.readouterr().out
