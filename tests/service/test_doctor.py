"""The doctor's checks, against things that are really broken: folders, servers, packages, machines."""

import dataclasses
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_hub import TinyHub, tiny_hub, write_vae
from tiny_sweeps import ROOT, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.service import doctor
from dtr_ray.service.cluster_answers import Case, Machine
from dtr_ray.service.doctor import CHECKS, examine
from dtr_ray.service.findings import Finding, within
from dtr_ray.service.installation import requirements
from dtr_ray.service.machine_checks import check_clock, check_gpus, check_object_store, check_open_files
from dtr_ray.service.node_checks import Answer, Order, code_digest, look
from dtr_ray.weights import download as download_module

SOFTWARE = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0", "dtr_ray": "0.1.0", "code": "0123456789"}
SOFTWARE |= dict.fromkeys(("torchvision", "diffusers", "numpy", "optuna"), "1.0")
GPU = {"present": True, "driver": "570.1", "cuda": "13.0", "count": 8, "names": ["A100"] * 8, "fault": ""}
GPU |= {"unsupported": [], "nccl": "2.30.7"}


def case_of(folder: Path, config: SweepConfig | None = None, limit_s: float = 60.0, **more: Any) -> Case:
    return Case(config, folder / "runs", more.pop("address", "local"), limit_s, **more)


def found(case: Case, *names: str) -> dict[str, list[Finding]]:
    """What checks find, by their names; those named here, or all."""
    result: dict[str, list[Finding]] = {name: [] for name in CHECKS if not names or name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHECKS", {name: CHECKS[name] for name in result})
        for named in examine(case):
            result[named.check].append(named.finding)
    return result


def only(case: Case, name: str) -> Finding:
    (finding,) = found(case, name)[name]
    return finding


def machine(name: str, cpus: float = 8.0, gpus: float = 0.0, **facts: Any) -> Machine:
    """A machine that has answered so."""
    return Machine(name, cpus, gpus, 1e9, Answer({key.replace("_", " "): v for key, v in facts.items()}, {}))


def test_all_is_well_on_this_machine_without_ray_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ray.init", None)
    config = tiny_sweep(tmp_path / "deep" / "runs")
    case = Case(config, tmp_path / "deep" / "runs", "local", 60.0)
    result = found(case)
    levels = {name: {finding.level for finding in findings} for name, findings in result.items()}
    machines = ("disk", "memory", "files")
    assert {name: level for name, level in levels.items() if name not in machines and level != {"ok"}} == {}
    assert all("fail" not in levels[name] for name in machines)
    assert "digits on 1 machine" in result["data"][0].text
    assert list(tmp_path.iterdir()) == []


def test_every_machine_of_a_real_cluster_answers(ray_cluster: str, tmp_path: Path):
    case = case_of(tmp_path, tiny_sweep(tmp_path), address=ray_cluster)
    result = found(case, "ray", "versions", "storage", "clock", "room", "data")
    assert [f for findings in result.values() for f in findings if f.level != "ok"] == []
    assert result["ray"][0].text == f"{ray_cluster}: 1 x (2 CPU, 0 GPU)"
    low, high = case.machines[0].clock_s
    assert low <= 0.0 <= high < 5.0
    assert case.machines[0].written
    assert [path for path in tmp_path.iterdir() if "runs" in path.name] == []


def test_a_folder_that_cannot_be_written_is_told_with_the_reason(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    finding = found(case_of(tmp_path), "ray", "storage")["storage"][0]
    assert finding.level == "fail"
    assert "runs cannot be written here: NotADirectoryError" in finding.text
    assert "storage.output" in finding.mend


def order(folder: Path, **changes: Any) -> Order:
    """What a machine is asked; `folder` holds the driver's token."""
    probe = folder / ".doctor-x"
    values = {"name": "n1", "working_folder": str(folder), "probe": str(probe), "token": "secret"}
    return Order(**{**values, "num_gpus": 0.0, "data": None, "weights": (), "limit_s": 10.0, **changes})


def test_a_machine_that_does_not_see_the_folder_or_another_one_is_named(tmp_path: Path):
    with_token, other, empty = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder, token in ((with_token, "secret"), (other, "another")):
        (folder / ".doctor-x").mkdir(parents=True)
        (folder / ".doctor-x" / "driver").write_text(token)
    answers = [look(order(folder, limit_s=2.0)) for folder in (with_token, other, empty)]
    assert [answer.facts["storage"].split(str(tmp_path))[0] for answer in answers] == [
        "",
        "reads something else in ",
        "does not see ",
    ]
    # The first one wrote, but into a folder of its own: here nothing is seen of it.
    case = case_of(tmp_path)
    case.machines = [Machine(f"m{n}", 8.0, 0.0, 0.0, answer) for n, answer in enumerate(answers)]
    first, second, third = found(case, "storage")["storage"]
    assert "what m0 writes there is not seen here" in first.text
    assert second.text.startswith("m1 reads something else")
    assert third.text.startswith("m2 does not see")
    assert {finding.level for finding in (first, second, third)} == {"fail"}


def test_a_full_disk_of_a_machine_is_told(tmp_path: Path):
    full = Path("/dev/full")
    probe = tmp_path / ".doctor-x"
    probe.mkdir()
    (probe / "driver").write_text("secret")
    (probe / "n1").symlink_to(full)
    assert "No space left on device" in look(order(tmp_path)).facts["storage"]


def test_what_hangs_runs_into_its_time_limit_and_the_rest_goes_on(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        case = case_of(tmp_path, tiny_sweep(tmp_path, tracking__uri=uri), limit_s=0.5)
        started = time.monotonic()
        result = found(case, "mlflow", "study")
        assert time.monotonic() - started < 5.0
    assert result["mlflow"] == [
        Finding("fail", "did not end within 0.5 s", result["mlflow"][0].mend),
    ]
    assert "--timeout" in result["mlflow"][0].mend
    assert result["study"][0].level == "ok"


def test_a_file_system_that_hangs_costs_one_part_of_a_machines_look(tmp_path: Path):
    probe = tmp_path / ".doctor-x"
    probe.mkdir()
    (probe / "driver").write_text("secret")
    os.mkfifo(probe / "n1")  # to open it for writing waits for a reader, for ever
    answer = look(order(tmp_path, limit_s=1.0))
    assert answer.errors["storage"].startswith("did not end within")
    assert answer.facts["open files"] > 0


def test_a_wrong_version_of_a_package_is_told_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "numpy-1.26.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = found(case_of(tmp_path), "packages")["packages"][0]
    assert finding == Finding("fail", "numpy is 1.26.4, not >=2.0", "pip install 'numpy>=2.0'")


def test_a_package_that_is_missing_and_a_python_that_is_too_old_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nrequires-python = ">=4"\ndependencies = ["no-such-thing>=1"]\n'
        '[project.optional-dependencies]\nmore = ["nor-this>=2"]\ndev = ["nor-that"]\n'
    )
    monkeypatch.setattr("dtr_ray.service.installation._PYPROJECT", project)
    result = found(case_of(tmp_path), "python", "packages")
    assert result["python"][0].text.endswith("is not >=4")
    assert [finding.level for finding in result["packages"]] == ["fail", "ok"]
    assert result["packages"][0].mend == "pip install 'no-such-thing>=1'"


def test_installed_metadata_says_the_same_as_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python, packages = requirements()
    info = tmp_path / "dtr_ray-0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: dtr_ray", "Version: 0", f"Requires-Python: {python}"]
    for requirement, extra in packages:
        lines.append(f"Requires-Dist: {requirement}" + (f' ; extra == "{extra}"' if extra else ""))
    lines.append('Requires-Dist: ruff ; extra == "dev"')
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("dtr_ray.service.installation._PYPROJECT", tmp_path / "none.toml")
    same_python, same = requirements()
    assert same_python == python
    assert [(r.name, r.specifier, extra) for r, extra in same] == [
        (r.name, r.specifier, extra) for r, extra in packages
    ]


def test_machines_that_differ_are_named_with_their_versions(tmp_path: Path):
    old = SOFTWARE | {"python": "3.11.2", "ray": "2.54.0", "code": "ffffffffff"}
    case = case_of(tmp_path)
    case.machines = [machine("a", software=SOFTWARE), machine("b", software=old)]
    ray_differs, code_differs, same = found(case, "versions")["versions"]
    assert ray_differs.text == "ray differs: a 2.60.0; b 2.54.0"
    assert code_differs.text == "dtr_ray's code differs: a 0123456789; b ffffffffff"
    assert (ray_differs.level, same.level) == ("fail", "ok")
    assert "python 3.11" in same.text


def test_the_code_of_a_package_has_one_digest_until_it_changes(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "inner" / "notes.txt").write_text("no code")
    assert code_digest(tmp_path) == before
    (tmp_path / "inner" / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", "1 machine with 8 x A100 (driver 570.1, CUDA 13.0, NCCL 2.30.7)"),
        ({"cuda": None, "count": 0}, "fail", "a PyTorch without CUDA"),
        ({"count": 0, "fault": "The NVIDIA driver is too old"}, "fail", "is too old (NVIDIA driver 570.1"),
        ({"count": 0, "names": []}, "fail", "PyTorch sees no GPU"),
        ({"unsupported": ["A100 (sm_80)"]}, "fail", "no code for A100 (sm_80)"),
        ({"nccl": None}, "fail", "has no NCCL"),
        ({"count": 4}, "fail", "Ray counts 8 GPUs, PyTorch 4"),
    ],
)
def test_gpus_that_cannot_be_used_are_told(changes: dict[str, Any], level: str, words: str, tmp_path: Path):
    config = tiny_sweep(tmp_path, resources={"workers_per_trial": 2, "gpus_per_worker": 1})
    case = case_of(tmp_path, config)
    case.machines = [machine("head", 0.0, gpu={"present": False, "driver": None, "count": 0})]
    case.machines.append(machine("a", 96.0, 8.0, gpu=GPU | changes))
    (finding,) = check_gpus(case)
    assert finding.level == level
    assert words in finding.text


def test_a_cluster_that_has_only_its_head_yet_is_told_so(tmp_path: Path):
    resources = {"gpus_per_worker": 1, "autoscaling": True, "max_concurrent": 4}
    case = case_of(tmp_path, tiny_sweep(tmp_path, resources=resources))
    head = machine("head", 0.0, gpu={"present": False, "driver": None, "count": 0}, data="", weights=[])
    case.machines = [head]
    result = found(case, "gpu", "room", "data", "weights")
    assert [finding.level for findings in result.values() for finding in findings] == ["ok", "ok", "warning"]
    assert "no machine that runs trials is up yet" in result["data"][0].text


def test_a_gpu_that_nobody_asks_for_only_warns(tmp_path: Path):
    case = case_of(tmp_path)
    case.machines = [machine("a", gpu=GPU | {"cuda": None, "count": 0})]
    assert [finding.level for finding in check_gpus(case)] == ["warning", "ok"]


def test_a_machine_whose_gpus_pytorch_cannot_look_at_says_why(tmp_path: Path):
    """Here PyTorch is asked for real, since Ray says that there are GPUs."""
    answer = look(order(tmp_path, probe="", num_gpus=2.0, limit_s=60.0))
    gpu = answer.facts["gpu"]
    assert gpu["present"]
    assert gpu["count"] or gpu["fault"] or gpu["cuda"] is None


@pytest.mark.parametrize(
    ("bounds", "level"), [((-0.1, 0.2), "ok"), ((3.0, 9.0), "warning"), ((-900.0, -80.0), "fail")]
)
def test_a_clock_that_is_off_is_told(bounds: tuple[float, float], level: str, tmp_path: Path):
    case = case_of(tmp_path)
    case.machines = [machine("a"), dataclasses.replace(machine("b"), clock_s=bounds)]
    (finding,) = check_clock(case)
    assert finding.level == level
    assert ("behind" in finding.text) == (bounds[1] < 0)


def test_limits_that_are_too_low_are_told(tmp_path: Path):
    case = case_of(tmp_path)
    shm = {"shm": ("/dev/shm", 10, 64_000_000)}
    case.machines = [machine("a", open_files=1024, space=shm)]
    assert [finding.level for finding in check_open_files(case)] == ["warning"]
    (finding,) = check_object_store(case)
    assert "larger than its shared memory" in finding.text


def test_a_trial_that_does_not_fit_and_data_that_are_not_there_are_told(tmp_path: Path):
    data = {"name": "folder", "path": str(tmp_path / "none"), "resolution": 8, "num_classes": 1}
    config = tiny_sweep(tmp_path, trial__data=data, resources__cpus_per_worker=4000)
    result = found(case_of(tmp_path, config), "ray", "room", "data")
    assert "one trial needs 1 worker of 4000 CPU" in result["room"][0].text
    assert f"data.path {tmp_path / 'none'} is no folder" in result["data"][0].text


class _Refusing(BaseHTTPRequestHandler):
    """A server that wants a password for all but its version."""

    seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self._answer(200, b"3.17.2")

    def do_POST(self) -> None:
        self.seen.append(self.headers.get("Authorization"))
        known = self.headers.get("Authorization") == "Basic bWU6c2VjcmV0"
        self._answer(200 if known else 401, b'{"experiments": []}')

    def _answer(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_mlflow_server_that_is_away_refuses_or_lets_us_in(
    refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def answer(uri: str) -> Finding:
        return only(case_of(tmp_path, tiny_sweep(tmp_path, tracking__uri=uri)), "mlflow")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = answer(f"http://me:secret@127.0.0.1:{free.getsockname()[1]}")
    assert away.level == "fail"
    assert "Connection refused" in away.text
    assert "secret" not in away.text
    refused = answer(refusing)
    assert (refused.level, "401" in refused.text) == ("fail", True)
    assert "MLFLOW_TRACKING_USERNAME" in refused.mend
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    let_in = answer(refusing)
    assert (let_in.level, "version 3.17.2" in let_in.text) == ("ok", True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0")
    assert answer(refusing).level == "warning"


def test_sqlite_files_that_are_none_and_databases_that_are_away_are_told(tmp_path: Path):
    broken, whole = tmp_path / "broken.db", tmp_path / "whole.db"
    broken.write_bytes(b"no database, " * 100)
    sqlite3.connect(whole).execute("create table t (x int)")
    levels = {}
    for path in (broken, whole, tmp_path / "new.db", broken / "below.db"):
        config = tiny_sweep(tmp_path, tracking__uri=f"sqlite:///{path}", storage__study=f"sqlite:///{path}")
        result = found(case_of(tmp_path, config), "mlflow", "study")
        assert result["mlflow"] == result["study"]
        levels[path.name] = result["mlflow"][0].level
    assert levels == {"broken.db": "fail", "whole.db": "ok", "new.db": "ok", "below.db": "fail"}
    config = tiny_sweep(tmp_path, storage__study="nosuch://me:secret@host/db")
    finding = only(case_of(tmp_path, config), "study")
    assert (finding.level, "secret" in finding.text) == ("fail", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    with tiny_hub() as server:
        server.add("artists/vae", write_vae(tmp_path / "vae"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("DTR_RAY_MIRROR", server.url)
        monkeypatch.setenv("DTR_RAY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(download_module, "_PAUSE_S", 0.01)
        yield server


def test_weights_are_looked_for_and_never_fetched(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = {"name": "digits", "resolution": 32, "vae": "artists/vae"}
    config = tiny_sweep(
        tmp_path, trial__data=data, trial__model__patch_size=2, trial__sampling__clip_denoised=False,
        trial__evaluation__features="inception", search__num_trials=1,
    )  # fmt: skip

    def answer() -> list[Finding]:
        return found(case_of(tmp_path, config), "ray", "weights")["weights"]

    hub.single["inception-2015-12-05.pt"] = bytes(1000)
    vae, inception = answer()
    assert (vae.level, inception.level) == ("ok", "ok")
    assert "a sweep fetches it" in vae.text
    assert hub.downloads().keys() <= {"inception-2015-12-05.pt"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.single.clear()
    vae, inception = answer()
    assert "HF_HUB_OFFLINE forbids" in vae.text
    assert "404" in inception.text
    assert {vae.level, inception.level} == {"fail"}
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_time_limit_raises_what_was_raised_and_no_process_ends():
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="wanted to end the process"):
        within(5.0, lambda: sys.exit(1))
    with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s"):
        within(0.05, lambda: time.sleep(0.5))


TWO_MACHINES = """
import json, pathlib, sys
import ray
from ray.cluster_utils import Cluster
from dtr_ray.service.cluster_answers import Case
from dtr_ray.service.doctor import examine
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=2)
case = Case(None, pathlib.Path(sys.argv[1]), cluster.address, 60.0)
print(json.dumps([[n.check, n.finding.level, n.finding.text] for n in examine(case)]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_machines_answer_each_for_itself(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_MACHINES, str(tmp_path / "runs")],
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts = {name: text for name, level, text in json.loads(done.stdout.splitlines()[-1]) if level == "ok"}
    assert "from 2 machines" in texts["storage"]
    assert texts["clock"] == "clocks agree within 2 s"
    assert "on 2 machines" in texts["versions"]
