"""The command: from real digits to a prepared folder, killed on the way; what it says to wrong input.

The whole of it, 5,000 digits killed twice with all their processes, takes minutes:

    python -m pytest -n 0 -m slow tests/test_prepare.py -s
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_preparations import PrepareCommand, prepare_config, prepare_here, write_digits, write_yaml
from tiny_sweeps import ROOT, snapshot, wait_until

from dtr_ray.config import DataConfig, PrepareConfig
from dtr_ray.config.read import read_prepare
from dtr_ray.data import check_data
from dtr_ray.data.manifest import Manifest
from dtr_ray.prepare import main

SHIPPED = sorted((ROOT / "search_spaces" / "data").glob("*.yaml"))
# Runs the command in a fresh process, and tells how long it took and what it has loaded.
_SECOND_RUN = """
import sys, time
started = time.perf_counter()
from dtr_ray.prepare import main
code = main(sys.argv[1:])
seconds = time.perf_counter() - started
print([code, seconds, sorted({"torch", "ray", "mlflow"} & set(sys.modules))])
"""


def _finished_shards(config: PrepareConfig) -> dict[str, int]:
    """The reports that are there, with their times."""
    folder = Path(config.output) / config.name / ".work" / "shards"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.json")}


def _kill_when(config: PrepareConfig, num_shards: int, *, everything: bool, own_ray: bool) -> dict[str, int]:
    """Starts the command, kills it when so many shards are done; returns the shards that are."""
    command = PrepareCommand(config, own_ray=own_ray)
    try:
        wait_until(lambda: len(_finished_shards(config)) >= num_shards or command.process.poll(), 400.0)
        assert command.process.poll() is None, command.output
        command.signal(signal.SIGKILL, list(command.processes()) if everything else [command.process.pid])
        assert command.wait(30.0) == -signal.SIGKILL
        if everything:
            command.wait_gone(60.0)
    finally:
        command.end()
    return _finished_shards(config)


def _check_prepared(config: PrepareConfig, count: int, corrupt: list[str]) -> None:
    folder = Path(config.output) / config.name
    manifest = Manifest.read(folder)
    assert (manifest.num_images, manifest.source.num_images) == (count, count + len(corrupt))
    assert sum(manifest.class_counts) == count
    assert manifest.class_counts == [count // 10] * 10
    assert sorted(image.name for image in manifest.skipped) == corrupt
    assert manifest.broken_files(folder) == []
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == (
        set(manifest.files) | {"manifest.json"}
    )


def _check_second_run(config: PrepareConfig, seconds: float = 2.0) -> None:
    """Nothing is done, and that is said at once; the best of three, since others use the machine too."""
    folder, file = Path(config.output) / config.name, Path(config.output) / f"{config.name}.yaml"
    before, taken = snapshot(folder), []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _SECOND_RUN, str(file)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        assert done.stdout.startswith(f"prepared already: {folder} holds ")
        code, took, loaded = yaml.safe_load(done.stdout.splitlines()[-1])
        assert (code, loaded) == (0, [])
        taken.append(took)
    assert min(taken) < seconds, taken
    assert snapshot(folder) == before


def _prepare_killed(config: PrepareConfig, kills: list[int], *, everything: bool, own_ray: bool) -> str:
    """Killed when so many shards are done, each time; then to the end. Nothing is done twice."""
    done: dict[str, int] = {}
    for num_shards in kills:
        now = _kill_when(config, num_shards, everything=everything, own_ray=own_ray)
        assert done.items() <= now.items()
        done = now
    times = {
        path.name: path.stat().st_mtime_ns
        for path in (Path(config.output) / config.name / "pixels").glob("*.npy")
        if path.with_suffix(".json").name in done
    }
    command = PrepareCommand(config, own_ray=own_ray)
    try:
        assert command.wait(600.0) == 0, command.output
        output = command.output
    finally:
        command.end()
    pixels = Path(config.output) / config.name / "pixels"
    assert {name: (pixels / name).stat().st_mtime_ns for name in times} == times
    assert len(times) >= kills[-1]
    return output


def test_digits_killed_on_the_way_are_all_there_in_the_end(ray_cluster: str, tmp_path: Path) -> None:
    corrupt = write_digits(tmp_path / "digits", 700, num_corrupt=10)
    config = prepare_config(tmp_path / "digits", tmp_path, resolution=64, shard_images=10)
    output = _prepare_killed(config, [3], everything=False, own_ray=False)
    assert "images done before" in output
    assert "10 images cannot be read and are left out" in output
    assert all(name in output for name in corrupt)
    section = yaml.safe_load(output[output.rindex("data:") :])["data"]
    check_data(DataConfig.from_dict(section))
    _check_prepared(config, 700, corrupt)
    _check_second_run(config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_5000_digits_killed_twice_with_all_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = write_digits(tmp_path / "digits", 4990, num_corrupt=10)
    config = prepare_config(
        tmp_path / "digits", tmp_path, resolution=32, shard_images=250, features=["efficientnet_lite0"]
    )
    started = time.monotonic()
    output = _prepare_killed(config, [3, 9], everything=True, own_ray=True)
    with capsys.disabled():
        print(f"\n{output}\nin {time.monotonic() - started:.0f} s, killed twice")
    assert all(name in output for name in corrupt)
    _check_prepared(config, 4990, corrupt)
    _check_second_run(config)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_preparation_says_how_to_go_on(tmp_path: Path, signum: int) -> None:
    write_digits(tmp_path / "digits", 700)
    config = prepare_config(tmp_path / "digits", tmp_path, resolution=64, shard_images=10)
    command = PrepareCommand(config)
    try:
        wait_until(lambda: len(_finished_shards(config)) >= 2, 300.0)
        command.signal(signum, [command.process.pid])
        assert command.wait(30.0) == 130
        command.wait_gone(60.0)
        output = command.output
    finally:
        command.end()
    assert "interrupted; everything is kept. To go on:\n  python -m dtr_ray.prepare " in output
    assert "Traceback" not in output
    assert len(_finished_shards(config)) >= 2
    _prepare_killed(config, [4], everything=True, own_ray=True)
    _check_prepared(config, 700, [])


@pytest.fixture
def small(tmp_path: Path, shared_cache: Path) -> PrepareConfig:
    """60 digits, 4 corrupt ones among them, and the file that describes them."""
    write_digits(tmp_path / "digits", 60, num_corrupt=4)
    config = prepare_config(tmp_path / "digits", tmp_path)
    write_yaml(config, tmp_path)
    return config


def _main(config: PrepareConfig, *words: str) -> int:
    return main([str(Path(config.output) / f"{config.name}.yaml"), *words])


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    small: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(small, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "tiny: 64 images of source folder, 16 x 16, 10 classes" in out
    assert "an image, measured on 6" in out
    assert "nothing was written" in out
    assert not (tmp_path / "tiny").exists()


def test_a_finished_folder_is_checked_named_and_refused_to_another_file(
    small: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_here(small)
    assert _main(small) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"prepared already: {tmp_path / 'tiny'} holds 60 images of 10 classes, 16 x 16; nothing"
    )
    assert yaml.safe_load(out[out.rindex("data:") :])["data"]["path"] == str(tmp_path / "tiny")
    assert _main(small, "--set", "resolution=8") == 2
    assert (
        "was prepared otherwise: resolution was 16 and is 8. Choose another name" in capsys.readouterr().err
    )
    assert _main(small, "--verify") == 0
    assert "all checksums hold" in capsys.readouterr().out
    path = tmp_path / "tiny/pixels/00000.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert _main(small, "--verify") == 1
    assert "1 of 2 files are broken:\n  pixels/00000.npy: its content has changed" in capsys.readouterr().err
    os.truncate(path, 100)
    assert _main(small) == 2
    assert "is damaged: pixels/00000.npy: 100 bytes, not" in capsys.readouterr().err


def test_a_finished_folder_needs_its_source_no_more(
    small: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_here(small)
    (tmp_path / "digits").rename(tmp_path / "elsewhere")
    assert _main(small) == 0
    assert "nothing to do (not compared with its source: " in capsys.readouterr().out


def test_a_changed_source_is_refused(
    small: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_here(small)
    next((tmp_path / "digits").rglob("*.png")).unlink()
    assert _main(small) == 2
    assert "the source has changed (64 images then, 63 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "resolutoin=8"], "did you mean resolution?"),
        (["--set", "source.path=nowhere"], "nowhere"),
        (["--set", "name=../x"], "name"),
        (["--no-such-option"], "--no-such-option"),
        (["--verify"], "has no manifest.json"),
    ],
)
def test_wrong_words_exit_2_with_one_line(small: PrepareConfig, words: list[str], expected: str) -> None:
    (Path(small.output) / "tiny").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dtr_ray.prepare", f"{small.output}/tiny.yaml", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_files_are_right_and_name_their_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=../schema/prepare.schema.json"
    config = read_prepare(path, check_paths=False)
    assert config.name == path.stem
    DataConfig.model_validate(config.data("prepared/x", 1))


def test_there_are_files_to_start_from() -> None:
    assert {path.stem for path in SHIPPED} >= {"ffhq256", "imagenet256", "coco"}
