"""What MLflow runs to load a registered model: it serves text by the code of its own version.

This process may already have imported the package gpt2 of another version, or of a repository. So what is imported here
is the folder `code` that lies beside this file in a registered model, and then the others have their names again.
"""

import sys
from pathlib import Path

from mlflow.models import set_model

CODE = Path(__file__).parent / "code"
others = {}
if CODE.exists():  # not while the model is logged
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "gpt2"}
    sys.path.insert(0, str(CODE))
try:
    from gpt2.tracking.serving import TextGenerator
finally:
    if CODE.exists():
        sys.path[:] = [path for path in sys.path if path != str(CODE)]  # also as MLflow has put it there
        for name in [name for name in sys.modules if name.partition(".")[0] == "gpt2"]:
            del sys.modules[name]
        sys.modules.update(others)

set_model(TextGenerator())
