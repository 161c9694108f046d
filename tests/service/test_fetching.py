"""Pretrained weights are on each machine before its first trial, and no trial downloads anything."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_clip import CHANNELS, write_clip
from tiny_hub import COMMIT, TinyHub, Trouble, tiny_hub, write_vae
from tiny_preparations import PrepareCommand, prepare_config
from tiny_sweeps import ROOT, folder_of, tiny_sweep
from tiny_trials import tiny_config

from dtr_ray.config import PrepareConfig, TrialConfig
from dtr_ray.service import cluster
from dtr_ray.service.fetching import fetch_here, fetch_on_nodes, preparation_weights, settled
from dtr_ray.service.worker import run_worker
from dtr_ray.sweep import main
from dtr_ray.weights import download as download_module
from dtr_ray.weights.finding import Weights

VAE, CLIP = "artists/vae", "artists/clip"
NEEDED = {
    *(
        f"GET /{VAE}/resolve/{COMMIT}/{name}"
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    ),
    *(
        f"GET /{CLIP}/resolve/{COMMIT}/{name}"
        for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {VAE: write_vae(folder / "vae"), CLIP: write_clip(folder / "clip")}


@pytest.fixture
def hub(served: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    """A hub with both, for this process, whose caches are empty."""
    with tiny_hub() as server:
        for name, folder in served.items():
            server.add(name, folder)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(download_module, "_PAUSE_S", 0.01)
        yield server


def data_of(folder: Path) -> dict[str, Any]:
    """Pictures with captions, and weights from the hub for both."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"the hand {number}")
    return {
        "name": "folder",
        "path": str(pictures),
        "resolution": 32,
        "vae": VAE,
        "text_encoder": CLIP,
        "text_channels": CHANNELS,
    }


def trial_of(folder: Path) -> TrialConfig:
    return tiny_config(
        data=data_of(folder), model__patch_size=2, sampling__clip_denoised=False, training__num_steps=2,
        evaluation__every_steps=1,
    )  # fmt: skip


def test_a_trial_downloads_nothing_after_its_start(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trial_of(tmp_path)
    weights = settled(config)
    assert [(one["source"], one["commit"], one["url"]) for one in weights] == [
        (VAE, COMMIT, hub.url),
        (CLIP, COMMIT, hub.url),
    ]
    # A machine that has joined since: its cache is empty, and the hub's `main` has moved on.
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "late"))
    hub.asked.clear()
    hub.commits = {VAE: COMMIT, CLIP: COMMIT}
    reports = run_worker(config, tmp_path / "sweep", "t0000", weights=weights)
    next(reports)
    assert {path for path in hub.asked if "resolve" in path} == NEEDED
    assert set(hub.asked.values()) == {1}
    asked = sum(hub.asked.values())
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["DTR_RAY_OFFLINE"] == "1"
    assert len(list(reports)) == 1
    assert sum(hub.asked.values()) == asked
    assert not {"HF_HUB_OFFLINE", "DTR_RAY_OFFLINE"} & os.environ.keys()


def test_a_preparation_names_its_weights() -> None:
    values = {"name": "x", "source": {"type": "folder", "path": "."}, "vae": "a/b", "text_encoder": "c/d"}
    expected = [Weights("vae", "a/b"), Weights("text_encoder", "c/d")]
    assert preparation_weights(PrepareConfig.from_dict(values)) == [*expected, Weights("inception")]
    assert preparation_weights(PrepareConfig.from_dict({**values, "features": []})) == expected


def test_machines_are_asked_for_the_weights_and_failures_name_the_machine(
    ray_cluster: str, served: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    own = {ray.get_runtime_context().get_node_id(): "machine-7"}
    fetch_on_nodes(fetch_here([Weights("vae", str(served[VAE]))]), own)
    assert "weights: machine-7 had them" in capsys.readouterr().err
    # Ray's processes have the tests' environment: they are offline.
    with pytest.raises(ValueError, match=r"^on machine-7: data\.vae nobody/vae: .*HF_HUB_OFFLINE forbids"):
        fetch_on_nodes([Weights("vae", "nobody/vae", commit=COMMIT)], own)
    with pytest.raises(ValueError, match=r"^on machine-7: data\.vae \./none is no folder"):
        fetch_on_nodes([Weights("vae", "./none")], own)
    fetch_on_nodes([Weights("vae", "./none")])  # there is no other machine
    fetch_on_nodes([], own)


def test_a_machine_that_is_lost_meanwhile_does_not_end_the_sweep(
    ray_cluster: str, served: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_on_nodes([Weights("vae", str(served[VAE]))], {"ab" * 28: "machine-8"})
    assert "weights: not on machine-8, which was lost meanwhile" in capsys.readouterr().err


def test_a_sweep_without_its_weights_ends_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(cluster, "connect", lambda **_: pytest.fail("Ray is not to start"))
    config = tiny_sweep(
        tmp_path,
        trial__data={"name": "digits", "resolution": 32, "vae": "nobody/vae"},
        trial__model__patch_size=2,
        trial__sampling__clip_denoised=False,
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert main([str(file)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: data.vae nobody/vae: ")
    assert "cannot be reached" in lines[0]
    assert not folder_of(config).exists()


TWO_MACHINES = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster
from dtr_ray.config import SweepConfig
from dtr_ray.service.sweep import run_sweep
from pathlib import Path

config = SweepConfig.from_dict(json.load(open(sys.argv[1])))
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, env_vars={"DTR_RAY_CACHE": sys.argv[2]})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
outcome = run_sweep(config, Path(config.storage.output) / config.name)
print(json.dumps([record.status for record in outcome.state.trials.values()]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_of_two_machines_fetches_once_whatever_its_trials(hub: TinyHub, tmp_path: Path) -> None:
    config = tiny_sweep(
        tmp_path / "runs",
        trial__data=data_of(tmp_path),
        trial__model__patch_size=2,
        trial__sampling__clip_denoised=False,
        trial__training__num_steps=4,
        trial__evaluation__every_steps=2,
        space={"routing.alpha": {"type": "quniform", "low": 1.0, "high": 4.0, "step": 0.5}},
        early_stopping={"name": "none"},
        search__num_trials=4,
    )
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(config.to_dict()))
    hub.troubles = [Trouble("cut", 1)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [sys.executable, "-c", TWO_MACHINES, str(file), str(tmp_path / "second")],
        env={**environment, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["completed"] * 4
    asked = {path: count for path, count in hub.asked.items() if "resolve" in path}
    cut = f"GET /{VAE}/resolve/{COMMIT}/diffusion_pytorch_model.safetensors"
    assert asked == dict.fromkeys(NEEDED, 2) | {cut: 3}
    for cache in ("cache", "second"):
        assert len(list((tmp_path / cache / "weights").rglob("*@main.json"))) == 2
    assert "weights: 1 more machine to have them" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_preparation_fetches_once_whatever_its_workers(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path)
    keys = {key: data[key] for key in ("vae", "text_encoder", "text_channels")}
    config = prepare_config(
        Path(data["path"]), tmp_path / "out", resolution=32, shard_images=4, num_workers=2, **keys
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    command = PrepareCommand(config)
    try:
        assert command.wait(300) == 0, command.output
        assert f"fetched data.vae {VAE}, " in command.output
    finally:
        command.end()
    assert {path: count for path, count in hub.asked.items() if "resolve" in path} == dict.fromkeys(NEEDED, 1)
