import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("script", ["train", "evaluate", "sample", "infer"])
def test_threads_sleep_while_they_wait(script: str) -> None:
    """OpenMP says so itself, when PyTorch is loaded."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import {script}"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "true"
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"OMP_WAIT_POLICY *= *'PASSIVE'", loaded.stderr)
