"""Weights from a hub on this machine: fetched once, whole and right, whatever goes wrong on the way."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tiny_hub import COMMIT, TinyHub, Trouble, tiny_hub
from tiny_trials import process_context

from dtr_ray.config import DataConfig
from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.weights import download as download_module
from dtr_ray.weights import finding as weights_module
from dtr_ray.weights.download import FileFacts
from dtr_ray.weights.finding import Found, Weights, find, required_weights
from dtr_ray.weights.offline import offline

NAME = "artists/tiny-vae"
VAE = Weights("vae", NAME)
CONFIG = json.dumps({"_class_name": "AutoencoderKL"}).encode()
TENSORS = bytes(range(256)) * 40
NEEDED = {"config.json": CONFIG, "diffusion_pytorch_model.safetensors": TENSORS}
NOT_NEEDED = {
    "README.md": b"# tiny",
    "diffusion_pytorch_model.bin": b"pickle",
    "diffusion_pytorch_model.fp16.safetensors": b"half",
    "diffusion_flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "safety_checker/model.safetensors": b"no",
    "vae.ckpt": b"original",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    """Ours in place of the public one, and empty caches."""
    with tiny_hub() as server:
        server.files[NAME] = NEEDED | NOT_NEEDED
        use_hub(server.url, tmp_path, monkeypatch)
        yield server


def use_hub(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("DTR_RAY_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download_module, "_PAUSE_S", 0.01)


def contents(found: Found) -> dict[str, bytes]:
    files = [path for path in found.path.rglob("*") if path.is_file()]
    return {path.relative_to(found.path).as_posix(): path.read_bytes() for path in files}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*partial*")]


def test_only_the_files_that_are_needed_are_fetched_and_only_once(hub: TinyHub) -> None:
    told: list[tuple[int, int]] = []
    found = find(VAE, lambda done, total: told.append((done, total)))
    assert contents(found) == NEEDED
    total = sum(map(len, NEEDED.values()))
    assert (found.fetched_bytes, found.weights.commit, found.weights.url) == (total, COMMIT, hub.url)
    assert told[-1] == (total, total)
    asked = sum(hub.asked.values())
    assert asked == 1 + len(NEEDED)
    again = find(VAE)
    assert (again.path, again.fetched_bytes, again.weights.commit) == (found.path, 0, COMMIT)
    assert sum(hub.asked.values()) == asked


def test_the_user_hears_what_is_fetched_and_how_much(
    hub: TinyHub, capsys: pytest.CaptureFixture[str]
) -> None:
    find(VAE)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"fetching data.vae {NAME}, 10.3 kB"
    assert lines[-1].startswith(f"fetched data.vae {NAME}, 10.3 kB in ")
    find(VAE)
    assert capsys.readouterr().err == ""


def _find_there(environment: dict[str, str], source: str) -> str:
    # The process is forked off one that was started in another environment.
    os.environ.clear()
    os.environ.update(environment)
    return str(find(Weights("vae", source)).path)


def test_eight_processes_at_once_cause_one_download(hub: TinyHub) -> None:
    with ProcessPoolExecutor(8, mp_context=process_context()) as pool:
        found = list(pool.map(_find_there, [dict(os.environ)] * 8, [NAME] * 8))
    assert len(set(found)) == 1
    assert hub.downloads() == dict.fromkeys(NEEDED, 1)
    assert sum(hub.asked.values()) == 1 + len(NEEDED)


@pytest.mark.parametrize("times", [1, 4])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: TinyHub, times: int) -> None:
    hub.troubles = [Trouble("cut", times)]
    assert contents(find(VAE)) == NEEDED
    assert len(hub.ranges) == times
    assert hub.sent == sum(map(len, NEEDED.values()))  # not a byte twice


@pytest.mark.parametrize("kind", ["500", "503", "429"])
@pytest.mark.parametrize("file", [".safetensors", "/revision/main"])
def test_a_server_that_recovers_is_waited_for(hub: TinyHub, kind: str, file: str) -> None:
    hub.troubles = [Trouble(kind, 2, file)]
    assert contents(find(VAE)) == NEEDED


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("404", ".safetensors", r"diffusion_pytorch_model.safetensors is not here .* answers 404"),
        ("500", ".safetensors", r"diffusion_pytorch_model.safetensors is not here .* answers 500"),
        ("500", "/revision/main", r"the VAE \(config.json, .*\) is not here .* answers 500"),
        ("cut", "config.json", r"config.json is not here .* ended after \d+ of \d+ bytes"),
        ("wrong byte", ".safetensors", r"sends has the SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"),
        ("wrong byte", "config.json", r"sends has the git hash [0-9a-f]{40}, not [0-9a-f]{40}"),
    ],
)
def test_a_server_that_fails_is_told_of_in_one_line_and_asked_again_the_next_time(
    hub: TinyHub, tmp_path: Path, kind: str, file: str, message: str
) -> None:
    hub.troubles = [Trouble(kind, 100, file)]
    with pytest.raises(ValueError, match=rf"^data\.vae {NAME}: .*{message}") as caught:
        find(VAE)
    assert "\n" not in str(caught.value)
    name = file if file == "config.json" else "diffusion_pytorch_model.safetensors"
    assert not list((tmp_path / "cache").rglob(name))  # nothing that looks like the file
    hub.troubles = []
    assert contents(find(VAE)) == NEEDED
    assert left_over(tmp_path / "cache") == []


def test_a_wrong_byte_is_noticed_and_the_file_asked_for_again(hub: TinyHub) -> None:
    hub.troubles = [Trouble("wrong byte", 1)]
    assert contents(find(VAE)) == NEEDED
    assert hub.downloads()["diffusion_pytorch_model.safetensors"] == 2


SCRIPT = "import sys; from dtr_ray.weights.finding import Weights, find; find(Weights('vae', sys.argv[1]))"


def test_a_killed_download_goes_on_where_it_was(hub: TinyHub, tmp_path: Path) -> None:
    hub.troubles = [Trouble("wait")]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, NAME], stderr=subprocess.DEVNULL)
    assert hub.waiting.wait(60)
    time.sleep(0.2)  # for the half to be written
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = [path.stat().st_size for path in (tmp_path / "cache").rglob("*partial*")]
    assert len(half) == 1
    assert contents(find(VAE)) == NEEDED
    assert hub.ranges == [f"bytes={half[0]}-"]
    assert left_over(tmp_path / "cache") == []


def test_a_partial_file_of_something_else_does_no_harm(hub: TinyHub, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "weights" / NAME.replace("/", "--") / COMMIT
    folder.mkdir(parents=True)
    for name, content in (("config.json", b"x" * 999), ("diffusion_pytorch_model.safetensors", b"x" * 999)):
        (folder / f".{socket.gethostname()}.partial.{name}").write_bytes(content)
    assert contents(find(VAE)) == NEEDED


@pytest.mark.parametrize(
    ("damage", "downloads"),
    [
        (lambda path: path.unlink(), 1),
        (lambda path: path.write_bytes(b"short"), 1),
        (lambda path: path.write_bytes(TENSORS[:-1] + b"?"), 1),
        (lambda path: os.utime(path, (1, 1)), 0),
    ],
    ids=["lost", "short", "wrong byte", "copied"],
)
def test_a_file_that_changed_is_read_again_and_fetched_where_it_is_wrong(
    hub: TinyHub, damage: Callable[[Path], object], downloads: int
) -> None:
    file = "diffusion_pytorch_model.safetensors"
    damage(find(VAE).path / file)
    before = hub.downloads()[file]
    assert contents(find(VAE)) == NEEDED
    assert hub.downloads()[file] - before == downloads
    asked = sum(hub.asked.values())
    find(VAE)
    assert sum(hub.asked.values()) == asked


def test_a_copied_cache_serves_a_machine_without_a_network(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find(VAE)
    (tmp_path / "cache").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path)
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "moved"))
    asked = sum(hub.asked.values())
    with offline():
        assert contents(find(VAE)) == NEEDED
    assert sum(hub.asked.values()) == asked


def test_what_is_checked_is_not_hashed_again(hub: TinyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(VAE)

    def fail(facts: FileFacts, path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(FileFacts, "fault", fail)
    assert find(VAE).path == found.path


def test_a_revision_and_a_settled_commit_are_obeyed(hub: TinyHub) -> None:
    first = find(VAE)
    hub.commits[NAME] = "f" * 40
    hub.files[NAME] = NEEDED | {"config.json": b"{}"}
    assert find(VAE).path == first.path  # `main` stays what it was when it was first asked for
    new = find(Weights("vae", NAME, commit="f" * 40))
    assert contents(new)["config.json"] == b"{}"
    assert find(VAE).path == new.path  # as the driver has settled it
    asked = sum(hub.asked.values())
    assert find(Weights("vae", f"{NAME}@{'f' * 40}")).path == new.path
    assert sum(hub.asked.values()) == asked + 1  # its files are here
    with pytest.raises(ValueError, match=r"@v2: http.* has no revision v2 of it .*404.*HF_TOKEN"):
        find(Weights("vae", f"{NAME}@v2"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", r"has no such repository \(.*401.*HF_TOKEN.* \./nobody/nothing"),
        ("what is this", "data.vae what is this is neither a folder here nor a hub's OWNER/NAME"),
        ("./vae", "data.vae ./vae is no folder"),
        ("artists/empty", "artists/empty at http.* is not what it is to be: it has no config.json"),
        ("artists/onnx", "it has no diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_name_that_is_wrong_is_told(hub: TinyHub, source: str, message: str) -> None:
    hub.files |= {"artists/empty": {"README.md": b""}, "artists/onnx": {"config.json": b"{}", "x.onnx": b""}}
    with pytest.raises(ValueError, match=message):
        find(Weights("vae", source))


def test_without_a_server_the_message_is_quick_and_has_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use_hub(url, tmp_path, monkeypatch)
    started = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        find(VAE)
    assert time.monotonic() - started < 2
    text = str(caught.value)
    assert "\n" not in text
    places = [NAME, "diffusion_pytorch_model.safetensors", str(tmp_path / "cache"), str(tmp_path / "hf"), url]
    for part in [*places, "Set HF_ENDPOINT", "copy the first", "local folder in data.vae"]:
        assert part in text


def test_a_server_that_says_nothing_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        monkeypatch.setattr(download_module, "_TIMEOUT_S", 0.2)
        with pytest.raises(ValueError, match="does not answer"):
            find(VAE)


def test_offline_nothing_is_asked(hub: TinyHub) -> None:
    with offline(), pytest.raises(ValueError, match="DTR_RAY_OFFLINE forbids to ask"):
        find(VAE)
    with offline(), pytest.raises(ValueError, match="DTR_RAY_OFFLINE forbids to ask"):
        find(Weights("inception"))
    assert sum(hub.asked.values()) == 0
    assert not {"DTR_RAY_OFFLINE", "HF_HUB_OFFLINE"} & os.environ.keys()
    assert contents(find(VAE)) == NEEDED


def test_what_hugging_faces_library_has_downloaded_is_used(hub: TinyHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    theirs = Path(snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "hf"))
    assert (theirs / "config.json").read_bytes() == CONFIG
    asked = sum(hub.asked.values())
    with offline():
        found = find(VAE)
    assert sum(hub.asked.values()) == asked
    assert contents(found) == NEEDED
    assert (found.weights.commit, found.fetched_bytes) == (COMMIT, 0)


def test_a_wrong_file_of_hugging_faces_library_is_not_used(hub: TinyHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    theirs = Path(snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "hf"))
    with (theirs / "diffusion_pytorch_model.safetensors").resolve().open("r+b") as file:
        file.write(b"?")
    with offline(), pytest.raises(ValueError, match="safetensors is not here"):
        find(VAE)
    assert contents(find(VAE)) == NEEDED


def test_a_private_repository_is_asked_for_with_the_token(
    hub: TinyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtr_ray.weights.hub import token_header

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert token_header() == {"Authorization": "Bearer hf_test"}


def test_the_weights_of_a_trial_are_those_that_its_sections_name() -> None:
    assert required_weights(DataConfig(), EvaluationConfig(features="efficientnet_lite0")) == []
    data = DataConfig(resolution=32, vae="a/b", text_encoder="c/d@v1")
    evaluation = EvaluationConfig(feature_weights="./inception.pt")
    expected = [Weights("vae", "a/b"), Weights("text_encoder", "c/d@v1")]
    assert required_weights(data) == expected
    assert required_weights(data, evaluation) == [*expected, Weights("inception", "./inception.pt")]


@pytest.fixture
def mirror(hub: TinyHub, monkeypatch: pytest.MonkeyPatch) -> TinyHub:
    """With a file that counts as Inception's."""
    hub.single["inception-2015-12-05.pt"] = TENSORS
    monkeypatch.setattr(weights_module, "_INCEPTION_SHA256", hashlib.sha256(TENSORS).hexdigest())
    monkeypatch.setenv("DTR_RAY_MIRROR", f"{hub.url}/")
    return hub


@pytest.mark.parametrize("kind", ["cut", "500", "wrong byte"])
def test_inception_comes_from_the_mirror_once(mirror: TinyHub, tmp_path: Path, kind: str) -> None:
    mirror.troubles = [Trouble(kind, 1, ".pt")]
    found = find(Weights("inception"))
    assert found.path == tmp_path / "cache" / "inception-2015-12-05.pt"
    assert found.path.read_bytes() == TENSORS
    assert (found.fetched_bytes, found.weights.url) == (len(TENSORS), mirror.url)
    asked = sum(mirror.asked.values())
    assert find(Weights("inception")) == Found(found.weights, found.path)
    assert sum(mirror.asked.values()) == asked == 2


def test_inception_that_cannot_be_had_names_the_ways_out(mirror: TinyHub, tmp_path: Path) -> None:
    mirror.troubles = [Trouble("404", 1, ".pt")]
    with pytest.raises(ValueError, match="answers 404") as caught:
        find(Weights("inception"))
    for part in [
        str(tmp_path / "cache"),
        "DTR_RAY_MIRROR",
        "evaluation.feature_weights",
        "efficientnet_lite0",
    ]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_own_copy_of_inception_is_hashed_once(
    mirror: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.pt"
    copy.write_bytes(TENSORS)
    own = Weights("inception", str(copy))
    assert find(own) == Found(own, copy)
    with monkeypatch.context() as patch:
        patch.setattr(FileFacts, "fault", lambda facts, path: pytest.fail("hashed again"))
        assert find(own).path == copy
    copy.write_bytes(TENSORS + b"?")
    with pytest.raises(ValueError, match=r"copy\.pt is not clean-fid's Inception \(it has the SHA-256"):
        find(own)
    assert sum(mirror.asked.values()) == 0


def test_an_address_that_is_none_is_refused(mirror: TinyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTR_RAY_MIRROR", "/data/mirror")
    with pytest.raises(ValueError, match="must begin with http://, https:// or file://"):
        find(Weights("inception"))


def test_a_folder_that_cannot_be_written_is_told(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set DTR_RAY_CACHE to one that can"):
        find(VAE)
