"""dvc.yaml says what the code does: each stage's deps are the modules that its script imports. Imports run one way."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from gpt2.tracking.logged_models import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# From the bottom up: a module imports from its own place and from those below.
ORDER = (
    "core",
    "config.py",
    "data",
    "model",
    "training",
    "evaluation",
    "generation",
    "export",
    "serving",
    "report",
    "tracking",
    "scripts",
)
MODULES = sorted(SRC.rglob("*.py"))


def imported_names(file: Path) -> set[str]:
    """The dotted names of all that a file imports, also of what may be no module but a name in one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_files(file: Path) -> set[Path]:
    """The modules of this repository that a file imports."""
    paths = (SRC / Path(*name.split(".")).with_suffix(".py") for name in imported_names(file))
    return {path for path in paths if path.is_file()}


def place(file: Path) -> str:
    """The name in ORDER of the place of a module."""
    return file.relative_to(SRC / "gpt2").parts[0] if file.is_relative_to(SRC / "gpt2") else "scripts"


def bears_on_results(file: Path) -> bool:
    """Whether an edit may change results; the rest reports, checks and mirrors."""
    return file.name == "device.py" or place(file) not in ("core", "config.py", "tracking")


def closure(file: Path, follow: bool = True) -> set[Path]:
    """A file and all that it imports, directly or through others; `follow` says whether through all of them."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += imported_files(one) if follow or bears_on_results(one) else []
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_imports(stage: str) -> None:
    script = SRC / f"{stage}.py"
    imported = closure(script, follow=False)
    if stage == "register":  # it mirrors the results of the code that other stages depend on
        imported = {file for file in imported if place(file) == "tracking"} | {script}
    else:
        imported = {file for file in imported if bears_on_results(file)}
    deps = [ROOT / dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")]
    assert {file for file in imported if not any(file.is_relative_to(dep) for dep in deps)} == set()
    assert {dep for dep in deps if not any(file.is_relative_to(dep) for file in imported)} == set()
    if stage != "register":
        assert {dep for dep in deps if dep.is_file() and not bears_on_results(dep)} == set()


def test_every_stage_has_its_script_and_section() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(params) == {*STAGES, "model", "runtime", "sweep"}
    for stage in STAGES:
        assert STAGES[stage]["cmd"] == f"python src/{stage}.py"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(SRC).as_posix())
def test_imports_run_downwards(file: Path) -> None:
    if file != SRC / "gpt2" / "__init__.py":
        upwards = {one for one in imported_files(file) if ORDER.index(place(one)) > ORDER.index(place(file))}
        assert upwards == set()
    if place(file) != "tracking":
        assert not [name for name in imported_names(file) if name.partition(".")[0] == "mlflow"]


def test_a_registered_model_requires_what_its_code_imports() -> None:
    names = {name for file in closure(SRC / "gpt2" / "tracking" / "serving.py") for name in imported_names(file)}
    distributions = packages_distributions()
    for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gpt2"}:
        assert {name.lower().replace("-", "_") for name in distributions[module]} & set(PACKAGES), module


def test_the_model_file_opens_alone() -> None:
    modules = {module.partition(".")[0] for module in imported_names(SRC / "gpt2" / "model" / "gpt2.py")}
    assert modules - sys.stdlib_module_names == {"torch"}
