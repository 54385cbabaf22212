"""A registered model runs the code of its own version, whatever other package gpt2 the process has."""

import shutil
import sys
from itertools import permutations
from pathlib import Path

import mlflow
import pandas as pd
import pytest

import gpt2.config

SERVING = """
import pandas as pd
from mlflow.pyfunc.model import PythonModel
from gpt2.config import VERSION

class TextGenerator(PythonModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        return pd.DataFrame({"text": [VERSION]})
"""


@pytest.fixture
def versions(tmp_path: Path) -> dict[str, str]:
    """Two saved models, by what their code says."""
    found = {}
    for version in ("one", "two"):
        package = tmp_path / version / "gpt2"
        (package / "tracking").mkdir(parents=True)
        for name in ("__init__.py", "tracking/__init__.py"):
            (package / name).touch()
        (package / "config.py").write_text(f"VERSION = {version!r}\n")
        (package / "tracking" / "serving.py").write_text(SERVING)
        code = package / "tracking" / "model_code.py"
        shutil.copy(Path(gpt2.__file__).parent / "tracking" / "model_code.py", code)
        found[version] = str(tmp_path / f"model_{version}")
        with pytest.MonkeyPatch.context() as patch:  # as if this were that version's own process
            patch.syspath_prepend(package.parent)
            for name in [name for name in sys.modules if name.partition(".")[0] == "gpt2"]:
                patch.delitem(sys.modules, name)
            mlflow.pyfunc.save_model(
                found[version], python_model=str(code), code_paths=[str(package)], pip_requirements=[]
            )
            for name in [name for name in sys.modules if name.partition(".")[0] == "gpt2"]:
                del sys.modules[name]
    return found


@pytest.mark.parametrize("order", list(permutations(("one", "two"))))
def test_each_version_runs_its_own_code(versions: dict[str, str], order: tuple[str, ...]) -> None:
    ours, path = sys.modules["gpt2.config"], list(sys.path)
    loaded = {version: mlflow.pyfunc.load_model(versions[version]) for version in order}
    for version, model in loaded.items():
        assert list(model.predict(pd.DataFrame({"prompt": ["The"]}))["text"]) == [version]
    assert sys.modules["gpt2.config"] is ours is gpt2.config
    assert sys.path == path
