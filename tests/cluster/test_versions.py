"""One Ray, one Python, one image everywhere, as constraints.txt and the Dockerfiles have them."""

import re
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement

import dtr_ray

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())
DOCKERFILES = sorted((ROOT / "docker").glob("*Dockerfile"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FILES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
PYTHON = re.findall(r"^FROM python:([\d.]+)-slim-", DOCKERFILES[0].read_text(encoding="utf-8"), re.MULTILINE)[
    0
]
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b"
    r"|(password|secret|token)\s*[:=]\s*['\"]?\w{12,}",
    re.IGNORECASE,
)


def test_pyproject_allows_the_pinned_ray_and_no_other_minor_version():
    (requirement,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    major, minor, _ = map(int, PINS["ray"].split("."))
    assert requirement.specifier.contains(PINS["ray"])
    assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")
    assert not requirement.specifier.contains(f"{major}.{minor - 1}.0")
    assert ray.__version__ == PINS["ray"]


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if name != "activate"))
def test_every_cluster_file_names_the_pinned_ray_and_no_other(name: str):
    found = set(re.findall(r"\b2\.\d{2}\.\d+\b", TEXTS[name]))
    assert found == {PINS["ray"]}, f"{name} names {found}"


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if name.endswith(".yaml")))
def test_every_image_is_this_version_of_the_package(name: str):
    tags = set(re.findall(r"registry\.example\.com/dtr-ray:(\S+)", TEXTS[name]))
    assert tags == ({f"{dtr_ray.__version__}-ray{PINS['ray']}"} if name != "local.yaml" else set())


def test_python_is_the_same_in_the_images_and_on_own_machines():
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{PYTHON}.0")
    for path in DOCKERFILES:
        assert f"FROM python:{PYTHON}-slim-bookworm\n" in path.read_text(encoding="utf-8"), path.name
    assert f"python{PYTHON} -m venv" in TEXTS["local.yaml"]


def test_compose_builds_the_tracking_server_of_constraints_and_pins_the_rest():
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    assert services["tracking"]["image"].endswith(f":{dtr_ray.__version__}-mlflow{PINS['mlflow']}")
    for service in services.values():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"\d+\.\d+", tag), f"{service['image']} is not pinned"


def test_the_documentation_names_the_pinned_ray():
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\b2\.\d{2}\.\d+\b", text)) == {PINS["ray"]}


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "docker").glob("*.*"))], ids=lambda path: path.name)
def test_nothing_secret_is_in_a_file(path: Path):
    assert SECRETS.search(path.read_text(encoding="utf-8")) is None


@pytest.mark.parametrize("name", ["a100.yaml", "gcp-a100.yaml", "local.yaml", "slurm.sh", "kuberay.yaml"])
def test_token_authentication_is_on(name: str):
    by_operator, by_environment = "authOptions: {mode: token}", "RAY_AUTH_MODE=token"
    text = TEXTS[name]
    if "cluster/activate" in text:
        text += TEXTS["activate"]
    assert by_operator in text or by_environment in text
