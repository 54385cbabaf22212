"""The library leaves the environment of a process that imports it as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpt2
from gpt2.core.environment import MLFLOW_DEFAULTS

IMPORT_ALL = """
import importlib, json, os, sys
before = dict(os.environ)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([name for name in {**before, **os.environ} if before.get(name) != os.environ.get(name)]))
"""


def test_no_import_changes_the_environment() -> None:
    library = Path(gpt2.__file__).parent
    files = [path.relative_to(library.parent).with_suffix("") for path in library.rglob("*.py")]
    modules = [".".join(path.parts) for path in files if path.name != "__init__"]
    assert "gpt2.tracking.runs" in modules
    environment = {name: value for name, value in os.environ.items() if name not in MLFLOW_DEFAULTS}
    # With telemetry, `import mlflow` itself would set a variable.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(library.parent)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(modules)],
        env=environment | quiet,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
