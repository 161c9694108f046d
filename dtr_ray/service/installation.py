"""The doctor's checks of what is installed: Python and packages against the versions that dtr_ray wants."""

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dtr_ray
from dtr_ray.service.cluster_answers import Case
from dtr_ray.service.findings import Finding, fail, ok, warning

_PYPROJECT = Path(dtr_ray.__file__).parents[1] / "pyproject.toml"


def check_python(case: Case) -> Iterator[Finding]:
    """Python is one that the package supports."""
    wanted, here = requirements()[0], platform.python_version()
    if wanted.contains(here, prereleases=True):
        yield ok(f"{here} ({wanted})")
    else:
        yield fail(f"{here} is not {wanted}", "make the virtual environment with a Python of these versions")


def check_packages(case: Case) -> Iterator[Finding]:
    """Every package is there in a version that is supported; those of extras where they are used."""
    extra = {"text"} if case.config is not None and case.config.trial.data.text_encoder is not None else set()
    good = 0
    for requirement, of in requirements()[1]:
        needed = of is None or of in extra
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if needed:
                yield fail(f"{requirement.name} is not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            good += 1
        else:
            report = fail if needed else warning
            yield report(
                f"{requirement.name} is {found}, not {requirement.specifier}", f"pip install '{requirement}'"
            )
    yield ok(f"{good} packages in the versions that dtr_ray {dtr_ray.__version__} wants")


def requirements() -> tuple[SpecifierSet, list[tuple[Requirement, str | None]]]:
    """Python's versions, and the packages with the extra that asks for each (None: always needed).

    From the pyproject.toml beside a checkout's package, else from what is installed; the developers' extra
    is left out. Raises PackageNotFoundError where there is neither.
    """
    if _PYPROJECT.is_file():
        project: dict[str, Any] = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        found = [(Requirement(text), None) for text in project["dependencies"]]
        extras = project["optional-dependencies"].items()
        more = [(Requirement(text), extra) for extra, texts in extras if extra != "dev" for text in texts]
        return SpecifierSet(project["requires-python"]), [*found, *more]
    metadata = importlib.metadata.metadata("dtr_ray")
    all_of_it = [Requirement(text) for text in importlib.metadata.requires("dtr_ray") or []]
    kept = [(requirement, _extra(requirement)) for requirement in all_of_it]
    return SpecifierSet(metadata["Requires-Python"]), [(r, extra) for r, extra in kept if extra != "dev"]


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement of installed metadata belongs to (`extra == "text"`)."""
    marker = str(requirement.marker or "")
    return marker.partition('extra == "')[2].partition('"')[0] or None
