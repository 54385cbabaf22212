import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from gpt2.runtime import COMPILED_STEPS, choose_compilation

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("script", ["train", "evaluate", "sample", "infer"])
def test_threads_spin_for_a_moment_and_then_sleep_while_they_wait(script: str) -> None:
    """OpenMP says so itself, when PyTorch is loaded."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import {script}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"OMP_WAIT_POLICY *= *'PASSIVE'", loaded.stderr)
    if "GOMP_" in loaded.stderr:  # GNU's
        assert re.search(r"GOMP_SPINCOUNT *= *'10000'", loaded.stderr)


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
    setting: Literal["auto"] | bool, device: str, steps: int, expected: bool
) -> None:
    assert choose_compilation(setting, torch.device(device), steps) is expected
