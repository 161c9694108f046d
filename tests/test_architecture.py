"""The house rules that a machine can check: what imports what, sizes, and what files must not name."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dtr_ray"
ENTRY_POINTS = {"sweep", "train", "train_best", "evaluate", "sample", "prepare", "analyze", "doctor"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 300, 40
# Besides every __init__, functions that read better in one piece.
LONG_FUNCTIONS = {("training/loop.py", "train"), ("training/loop.py", "run")}

IMPORT_ALL_BLOCKED = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "mlflow"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import dtr_ray
above = set(sys.argv[1:]) | {"dtr_ray.service"}
names = [
    m.name
    for m in pkgutil.walk_packages(dtr_ray.__path__, "dtr_ray.", onerror=lambda name: None)
    if m.name not in above and not m.name.startswith("dtr_ray.service.")
]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring apart."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_everything_but_the_service_imports_without_ray_and_mlflow():
    above = [f"dtr_ray.{name}" for name in sorted(ENTRY_POINTS)]
    assert int(run_python(IMPORT_ALL_BLOCKED, *above)) > 10


def imported(module: str, heavy: set[str]) -> str:
    """What of `heavy` is loaded with a module."""
    return run_python(f"import {module}, sys; print(*sorted({heavy!r} & set(sys.modules)))")


@pytest.mark.parametrize("module", ["dtr_ray", "dtr_ray.config"])
def test_configuration_imports_without_torch(module: str):
    assert imported(module, {"torch", "ray", "mlflow", "numpy", "matplotlib"}) == ""


def test_a_sweeps_driver_starts_without_what_its_trials_alone_need():
    needless = {"diffusers", "timm", "torchvision", "transformers", "matplotlib", "mlflow"}
    assert imported("dtr_ray.service.sweep", needless) == ""


def test_modules_are_under_300_lines():
    lengths = {
        str(m.relative_to(PACKAGE)): len(m.read_text(encoding="utf-8").splitlines()) for m in modules()
    }
    assert {name: n for name, n in lengths.items() if n >= MAX_MODULE_LINES} == {}


def test_functions_are_under_40_lines():
    found = {
        (m.relative_to(PACKAGE).as_posix(), f.name): own_lines(f)
        for m in modules()
        for f in functions(m)
        if f.name != "__init__"
    }
    long = {key: n for key, n in found.items() if n >= MAX_FUNCTION_LINES and key not in LONG_FUNCTIONS}
    assert long == {}


def test_folders_are_at_most_two_levels_deep():
    assert [m for m in modules() if len(m.relative_to(PACKAGE).parts) > 2] == []
    assert [m for m in modules() if m.stem in {"utils", "helpers", "common", "misc"}] == []


def test_no_file_names_a_package_index_or_a_path_of_one_machine():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    forbidden = re.compile(
        r"pypi\.org|pythonhosted|--(?:extra-)?index-url|--find-links|download\.pytorch"
        r"|(?<![\w./-])/(?:work|root|opt|Users)/|(?<![\w./-])/home/(?!ray\b)"
    )
    hits = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes()
        if b"\0" not in text:
            lines = text.decode("utf-8").splitlines()
            hits += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if forbidden.search(line)]
    assert hits == []


def test_ci_runs_the_command_of_the_readme():
    command = subprocess.run([ROOT / ".ci/run", "--print"], capture_output=True, text=True, check=False)
    assert command.returncode == 0, command.stderr
    assert command.stdout.strip() in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "-c constraints.txt" in command.stdout
    assert "pytest" in command.stdout
