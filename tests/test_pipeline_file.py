"""dvc.yaml says what the code does: each stage's deps are the modules that its script imports."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
MIRROR = {"src/gpt2/tracking.py", "src/gpt2/registry.py"}  # an edit there changes no result, so it reruns nothing


def imported_files(path: Path) -> set[str]:
    """The repository's modules that a file imports, directly or through others, and the file itself."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(ROOT).as_posix()
        if name in found | MIRROR:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            candidates = (SRC / Path(*module.split(".")).with_suffix(".py") for module in modules)
            waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_imports(stage: str) -> None:
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    assert code == imported_files(SRC / f"{stage}.py")


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


def test_the_loop_does_not_track() -> None:
    assert not imported_files(SRC / "gpt2" / "training.py") & MIRROR
