"""dvc.yaml says what the code does: each stage's deps are the modules that its script imports."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from gpt2.tracking.registry import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
MIRROR = {"src/gpt2/tracking.py", "src/gpt2/registry.py"}  # an edit there changes no result, so it reruns nothing


def imported_files(path: Path) -> set[str]:
    """The repository's modules that a file imports, directly or through others (not MIRROR's), and the file itself."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(ROOT).as_posix()
        if name in found:
            continue
        found.add(name)
        if name in MIRROR:
            continue
        candidates = (SRC / Path(*module.split(".")).with_suffix(".py") for module in imported_modules(file))
        waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


def imported_modules(file: Path) -> set[str]:
    """The dotted names of all that a file imports, also of what may be no module but a name in one."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_imports(stage: str) -> None:
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    assert code == imported_files(SRC / f"{stage}.py") - MIRROR


def test_every_stage_has_its_script_and_section() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(params) == {*STAGES, "model"}
    for stage in STAGES:
        assert STAGES[stage]["cmd"] == f"python src/{stage}.py"


def test_mlflow_stays_in_its_modules() -> None:
    users = {
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        if any(
            isinstance(node, ast.Import | ast.ImportFrom) and "mlflow" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert users == {"gpt2/tracking.py", "gpt2/registry.py", "gpt2/serving.py"}


def test_a_registered_model_requires_what_its_code_imports() -> None:
    files = imported_files(SRC / "gpt2" / "serving.py")
    modules = {module.partition(".")[0] for file in files for module in imported_modules(ROOT / file)}
    distributions = packages_distributions()
    for module in modules - sys.stdlib_module_names - {"gpt2"}:
        assert {name.lower().replace("-", "_") for name in distributions[module]} & set(PACKAGES), module


def test_the_loop_does_not_track() -> None:
    assert not imported_files(SRC / "gpt2" / "training.py") & MIRROR
