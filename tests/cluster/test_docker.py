"""docker/Dockerfile: the pins of the tests' environment, and what Ray's launcher needs in a container."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def copied() -> list[str]:
    return [source for line in LINES if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_every_copied_file_exists_and_the_ignore_file_lets_it_through():
    assert copied()
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    ignore = (ROOT / "docker/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[0] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == set(copied())


def test_what_is_installed_comes_from_the_constraints_alone():
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert '".[cluster,text]"' in installs[0]
    version = re.search(r"ray\.__version__ == '([\d.]+)'", installs[0])
    assert version is not None, "the image checks its own Ray"
    assert f"ray=={version[1]}" in CONSTRAINTS


def test_the_python_is_one_that_the_package_supports():
    assert re.search(r"^FROM python:3\.1[123]-slim-", DOCKERFILE, flags=re.MULTILINE)


def test_the_container_has_what_the_launcher_uses():
    apt = next(line for line in LINES if "apt-get install" in line)
    assert {"openssh-client", "rsync", "tini", "tmux"} <= set(apt.split())
    assert 'ENTRYPOINT ["tini", "--"]' in DOCKERFILE


def test_it_runs_as_the_user_ray_whose_home_is_in_the_environment():
    assert LINES.index("USER ray") > max(i for i, line in enumerate(LINES) if line.startswith("RUN"))
    # Ray mounts files of the host's first user, and reads HOME from the image's configuration.
    assert "--uid 1000" in DOCKERFILE
    assert "ENV HOME=/home/ray" in DOCKERFILE
