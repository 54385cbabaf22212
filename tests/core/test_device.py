import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from gpt2.core.device import (
    COMPILED_STEPS,
    check_memory,
    choose_compilation,
    choose_device,
    choose_micro_batch_size,
    choose_precision,
)

ErrorLine = Callable[[Callable[[], object]], str]
SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(("script", "spins"), [("train", 0), ("infer", 10000)])
def test_threads_spin_for_a_moment_or_not_and_then_sleep_while_they_wait(script: str, spins: int) -> None:
    """OpenMP says so itself, when PyTorch is loaded."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import {script}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"OMP_WAIT_POLICY *= *'PASSIVE'", loaded.stderr)
    if "GOMP_" in loaded.stderr:  # GNU's
        assert re.search(rf"GOMP_SPINCOUNT *= *'{spins}'", loaded.stderr)


@pytest.mark.parametrize("script", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_import_the_library_before_torch(script: Path) -> None:
    imports = [
        node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    packages = [module.split(".")[0] for module in modules]
    assert "gpt2" in packages and "torch" not in packages[: packages.index("gpt2")]


@pytest.mark.parametrize(
    ("name", "capabilities", "expected"),
    [
        ("auto", {"amx_bf16": True}, torch.bfloat16),
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"avx2": True, "amx_bf16": False}, torch.float32),
        ("auto", {}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {"amx_bf16": True}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_computes_it(
    monkeypatch: pytest.MonkeyPatch, name: str, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(name, torch.device("cpu")) == expected


def test_a_device_that_is_not_there_is_refused(error_line: ErrorLine) -> None:
    assert "device cuda:99 is not available here" in error_line(lambda: choose_device("cuda:99"))


def test_what_cannot_fit_into_memory_is_refused(error_line: ErrorLine) -> None:
    check_memory(10**6, torch.device("cpu"))
    check_memory(10**18, torch.device("cuda"))  # tells so itself
    assert "need at least 1,000,000,000 GB" in error_line(lambda: check_memory(10**18, torch.device("cpu")))


def provide(monkeypatch: pytest.MonkeyPatch, headers_folder: Path, compiler: bool, headers: bool) -> None:
    """Let there be what compiling needs, or not."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(headers_folder))
    if headers:
        (headers_folder / "Python.h").touch()


def test_auto_computes_more_at_once_on_gpus() -> None:
    found = [choose_micro_batch_size("auto", torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert found[0] < found[1] == found[2]
    assert choose_micro_batch_size(3, torch.device("cuda")) == 3


@pytest.mark.parametrize(
    ("setting", "device", "steps", "expected"),
    [
        ("auto", "cuda", COMPILED_STEPS, True),
        ("auto", "cuda", COMPILED_STEPS - 1, False),
        ("auto", "cpu", 10**6, False),
        (True, "cpu", 1, True),
        (False, "cuda", 10**6, False),
    ],
)
def test_auto_compiles_long_trainings_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: Literal["auto"] | bool,
    device: str,
    steps: int,
    expected: bool,
) -> None:
    provide(monkeypatch, tmp_path, compiler=True, headers=True)
    assert choose_compilation(setting, torch.device(device), steps) is expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("compiler", "headers"), [(False, True), (True, False)])
def test_without_a_compiler_or_headers_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error_line: ErrorLine,
    device: str,
    compiler: bool,
    headers: bool,
) -> None:
    provide(monkeypatch, tmp_path, compiler, headers)
    assert choose_compilation("auto", torch.device(device), COMPILED_STEPS) is False
    assert choose_compilation(False, torch.device(device), COMPILED_STEPS) is False
    assert "compiler" in error_line(lambda: choose_compilation(True, torch.device(device), COMPILED_STEPS))
