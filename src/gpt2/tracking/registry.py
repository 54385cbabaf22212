"""Models in MLflow's registry: a version for each set of weights. Which one is the champion: see champion.py."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.file_utils import get_local_path_or_none

from gpt2.config import champion_uri
from gpt2.core.errors import NoModelError, UserError
from gpt2.core.files import atomic_write, file_lock
from gpt2.core.paths import LINEAGE, MODEL, PARAMS, ROOT, TOKENS, main_root
from gpt2.model.weights import WEIGHTS, load_model, read_config
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.logged_models import EXAMPLE, NO_STEP, log_model, whole_models_of
from gpt2.tracking.runs import PARENT_SHA256, SYSTEM_METRICS
from gpt2.tracking.store import STORE_ERRORS, read_store, store_lock, withdraw_receipt
from gpt2.training.history import CURVES

TEST_LOSS = "gpt2.test_loss"
RUN_ID = "gpt2.run_id"  # MLflow's own link to a version's run cannot be changed when that run is deleted
PROJECT_VERSION = "gpt2.project_version"  # of the code that registered a version
DOCUMENTS = TOKENS / "documents.csv"
NOT_THERE = tuple(map(ErrorCode.Name, (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)))


def register(
    name: str, run: Run, made_from: dict[str, str], measured: dict[str, str], shown: dict[str, str]
) -> ModelVersion:
    """Return the version of registered model `name` that holds the weights in data/model, made if there is none.

    Tags `made_from` are those of the weights; `measured` and `shown` replace older ones, `shown` comes first where
    MLflow lists them. `run` must be the active run; the model is named after it, and gets its results.
    """
    client, model_sha256 = mlflow.MlflowClient(), made_from[MODEL_SHA256]
    with store_lock():
        version = find_version(client, model_sha256, name)
        if version and is_lost(version):
            client.delete_model_version(name, version.version)
            version = None
        if version is None:
            model_name = re.sub("""[/:.%"']""", "-", str(run.info.run_name))  # which MLflow allows in no model's name
            model_name = re.sub("^step-", "run-step-", model_name)  # step-N is in the middle of a training
            logged = log_model(model_name, [MODEL, LINEAGE, PARAMS, DOCUMENTS], NO_STEP, model_sha256, EXAMPLE)
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            tags = shown | made_from | {PROJECT_VERSION: project["version"]}
            made = mlflow.register_model(logged.model_uri, name, tags=tags)
            version = find_version(client, model_sha256, name) or made
            if int(version.version) < int(made.version):  # another machine has registered these weights meanwhile
                client.delete_model_version(name, made.version)
        for key, value in (shown | measured | {RUN_ID: run.info.run_id}).items():
            client.set_model_version_tag(name, version.version, key, value)
        version = client.get_model_version(name, version.version)
        if model_id := logged_model_of(version):
            _log_results_of(client, model_id, run.info.run_id)
        return version


def logged_model_of(version: ModelVersion) -> str | None:
    """Return the id of the logged model that a version was made of."""
    found = re.fullmatch(r"models:/(m-\w+)", version.source or "")
    return found[1] if found else None


def _log_results_of(client: mlflow.MlflowClient, model_id: str, run_id: str) -> None:
    """Let a logged model show the values of the whole run. Those it has stay."""
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith((*CURVES, SYSTEM_METRICS))]
    points = [point for name in names for point in client.get_metric_history(run_id, name)]
    found = [Metric(one.key, one.value, one.timestamp, one.step, model_id=model_id) for one in points]
    client.log_batch(run_id, metrics=found)


def fetch_model(uri: str) -> Path:
    """Return the local model folder behind a registry or run URI, e.g. models:/gpt2@champion or runs:/<id>/model.

    A training's checkpoints are runs:/<id>/step-<number>, or models:/m-<id>. Raises UserError if there is none, or
    another SHA-256 is recorded in it than was registered.
    """
    with _open_store(uri):
        if checkpoint := _checkpoint_at(uri):
            return _local_artifacts(checkpoint.artifact_location, checkpoint.tags, uri, "step-") / MODEL.name
        return artifacts_folder(_version_at(mlflow.MlflowClient(), uri)) / MODEL.name


def artifacts_folder(version: ModelVersion) -> Path:
    """Return where a version's files are on this machine: in the store, or in a copy that is kept here.

    Raises UserError if its model is missing, or another SHA-256 is recorded in it than was registered.
    """
    source = mlflow.MlflowClient().get_model_version_download_uri(version.name, version.version)
    return _local_artifacts(source, version.tags, uri_of(version))


def _local_artifacts(source: str, tags: dict[str, str], uri: str, prefix: str = "") -> Path:
    if not is_ours(tags):
        raise UserError(f"another program has made {uri}")
    if local := get_local_path_or_none(source):
        folder = Path(local).resolve() / "artifacts"
        if not folder.exists():
            withdraw_receipt()  # the next `dvc repro` registers what can be registered again
        _check_recorded(folder, tags, uri)
        return folder
    kept = main_root() / ".cache" / "models" / f"{prefix}{tags[MODEL_SHA256]}"
    if kept.exists():  # whole, and perhaps of another user, who alone may lock it
        return kept / "artifacts"
    with file_lock(kept.with_suffix(".lock"), f"another process downloads {uri}"):
        if not kept.exists():
            with atomic_write(kept) as partial:
                partial.mkdir()
                try:
                    repository = get_artifact_repository(source)
                    if is_there := bool(repository.list_artifacts("artifacts")):
                        repository.download_artifacts("artifacts", str(partial))
                except Exception as error:  # whatever the driver of a storage raises
                    raise UserError(f"{uri} cannot be downloaded from {source} ({error})") from None
                if not is_there:
                    withdraw_receipt()
                    raise UserError(f"MLflow's store has lost the files of {uri}; `dvc repro` registers what it can")
                _check_recorded(partial / "artifacts", tags, uri)
                load_model(partial / "artifacts" / MODEL.name)  # compares the SHA-256 of its files
    return kept / "artifacts"


def is_ours(tags: dict[str, str]) -> bool:
    """Tell by what the store says of a model if this project has made it: by a SHA-256, which also names a folder."""
    return bool(re.fullmatch("[0-9a-f]{64}", tags.get(MODEL_SHA256, "")))


def _check_recorded(folder: Path, tags: dict[str, str], uri: str) -> None:
    if read_config(folder / MODEL.name)[1] != tags[MODEL_SHA256]:
        raise UserError(f"{folder / MODEL.name} does not hold the weights that were registered as {uri}")


def verify(uri: str) -> str:
    """Check that the weights behind a URI are those that were registered, and say so. Raises UserError if not."""
    folder = fetch_model(uri)
    load_model(folder)  # reads the weights, and compares their SHA-256
    return f"{folder / WEIGHTS} has the SHA-256 that was registered, {read_config(folder)[1]}"


@contextmanager
def open_version(uri: str) -> Iterator[ModelVersion]:
    """Read the store; yield the version that a URI names. Raises NoModelError if there is none.

    Raises UserError if the store fails.
    """
    with _open_store(uri):
        yield _version_at(mlflow.MlflowClient(), uri)


@contextmanager
def _open_store(uri: str) -> Iterator[None]:
    """Read the store, to find what a URI names. Raises what open_version does."""
    hint = "train one with `dvc repro`, or register what has been trained with `python src/register.py`"
    mends = True  # the next `dvc repro`
    try:
        with read_store():
            try:
                yield
            except MlflowException:
                if numbers := _version_numbers(mlflow.MlflowClient(), uri):
                    hint = f"there are versions {', '.join(numbers)}"
                    if mends := uri.partition("@")[2] == champion_uri(PARAMS).partition("@")[2]:
                        hint += "; `dvc repro` chooses the champion anew"
                raise
    except STORE_ERRORS as error:
        message = " ".join(str(error).split())
        if getattr(error, "error_code", None) not in NOT_THERE:
            raise UserError(f"MLflow's store fails ({message})") from None
        if mends:
            withdraw_receipt()
        raise NoModelError(f"no model at {uri} ({message}); {hint}") from None


def _checkpoint_at(uri: str) -> LoggedModel | None:
    """Return the model from the middle of a training that a URI names; none if it may name a version."""
    if found := re.fullmatch(r"models:/(m-\w+)", uri):
        model = mlflow.MlflowClient().get_logged_model(found[1])
    elif (found := re.fullmatch(r"runs:/(\w+)/(step-\d+)", uri)) and (models := whole_models_of(*found.groups())):
        model = models[0]
    else:
        return None
    if not is_ours(model.tags):
        raise MlflowException("another program has logged it", RESOURCE_DOES_NOT_EXIST)
    return model


def _version_at(client: mlflow.MlflowClient, uri: str) -> ModelVersion:
    if found := re.fullmatch("runs:/([^/]+)/(.+)", uri):  # equal weights of several runs are stored once
        run = client.get_run(found[1])
        version = find_version(client, run.data.tags.get(MODEL_SHA256, "")) if found[2] == MODEL.name else None
        if version is None:
            names = ", ".join(reversed([one.name for one in whole_models_of(found[1], "step-%")]))
            message = f"this run has no {found[2]}" + (f"; it has {names}" if names else "")
            raise MlflowException(message, RESOURCE_DOES_NOT_EXIST)
        return version
    named = get_model_name_and_version(client, uri)
    if len(named) != 2:
        message = "give a version or an alias, e.g. models:/gpt2/1 or models:/gpt2@champion"
        raise MlflowException.invalid_parameter_value(message)
    version = client.get_model_version(*named)
    if not is_ours(version.tags):
        raise MlflowException("another program has registered it", RESOURCE_DOES_NOT_EXIST)
    return version


def _version_numbers(client: mlflow.MlflowClient, uri: str) -> list[str]:
    name = re.match(r"models:/([\w.-]+)", uri)
    found = client.search_model_versions(f"name = '{name[1]}'") if name else []
    return [str(version.version) for version in found]


def find_version(client: mlflow.MlflowClient, model_sha256: str, name: str | None = None) -> ModelVersion | None:
    """Return the first version that holds the weights of a SHA-256, of any registered model or of one."""
    conditions = [f"tags.`{MODEL_SHA256}` = '{model_sha256}'", *([f"name = '{name}'"] if name else [])]
    found = client.search_model_versions(" and ".join(conditions))
    return min(found, key=lambda version: int(version.version), default=None)


def unchanged_parent(made_from: dict[str, str]) -> ModelVersion | None:
    """Return the version from whose weights a training started, if it ended with them too."""
    sha256 = made_from[MODEL_SHA256]
    if made_from.get(PARENT_SHA256) != sha256:
        return None
    version = find_version(mlflow.MlflowClient(), sha256)
    return version if version and version.tags.get(PARENT_SHA256) != sha256 else None  # else it is of this training


def is_lost(version: ModelVersion) -> bool:
    """Tell whether the store has a version's entry, but not its files."""
    return not mlflow.artifacts.list_artifacts(uri_of(version))


def uri_of(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"
