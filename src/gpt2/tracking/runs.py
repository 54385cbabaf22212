"""Runs in MLflow: a live view of training, and the mirror of the pipeline's files, which can be rebuilt from them."""

import contextlib
import json
import logging
import os
import platform
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that does not answer is given up in seconds, not in MLflow's quarter of an hour.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
import pandas as pd
import torch
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from sqlalchemy.exc import SQLAlchemyError

from gpt2.config import Params
from gpt2.core.device import choose_device
from gpt2.core.errors import UserError
from gpt2.core.files import exclusive, read_json, sha256_of
from gpt2.core.paths import METRICS, PARAMS, PLOTS, RECEIPT, ROOT, SAMPLES, TOKENS, experiment_name, main_root
from gpt2.tracking.database import ARTIFACTS, check_database, database_uri, make_paths_relative
from gpt2.tracking.lineage import git_commit, hash_of, run_key, train_key
from gpt2.training.history import LogMetrics, read_curves

EXPERIMENT = "gpt2"
FLUSH_SECONDS = 5  # a write to the store costs as much as a small training step
BATCH_LIMIT = 1000  # points in one call, MLflow's own limit
# The last two: a database whose driver is not installed, and an address that is none.
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError)
SAMPLES_TABLE = "samples/samples.json"

TRAIN_KEY, RUN_KEY, RESULTS_KEY = "gpt2.train_key", "gpt2.run_key", "gpt2.results_key"
MODEL_SHA256 = "gpt2.model_sha256"
EXPERIMENT_NAME, COMMIT, ENVIRONMENT = "dvc.experiment", "mlflow.source.git.commit", "gpt2.environment"


def store_lock() -> contextlib.AbstractContextManager[None]:
    """Return the lock under which processes of this checkout and its experiments change the store's structure."""
    return exclusive(main_root() / ".cache" / "mlflow.lock", "another process changes MLflow's store")


@contextlib.contextmanager
def open_store() -> Iterator[str]:
    """Connect to the store, making it if need be, and yield the id of the experiment. Raises one of STORE_ERRORS."""
    with connected(make=True) as database:
        with store_lock():
            experiment_id = _open_experiment(database)
        yield experiment_id


@contextlib.contextmanager
def connected(make: bool = False) -> Iterator[Path | None]:
    """Let the block use the store; yield its database's path, or None if it has another address than a file's.

    The store is the one that MLFLOW_TRACKING_URI names, else mlflow.db in the main checkout. A database in the checkout
    holds relative paths, so that the checkout can be moved: the block runs in the main checkout's folder.
    Raises one of STORE_ERRORS, also if there is no database and none is to be made.
    """
    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # its errors are raised as well
    warnings.filterwarnings("ignore", module=r"mlflow\.")  # advice on schemas and input examples
    root = main_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"  # MLflow sets the variable to what it uses
    # A relative one would lie in an experiment's folder, and be deleted with it.
    database = root / uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    with contextlib.chdir(root):
        if database:
            with store_lock():  # processes that make a database at once would break it
                if not make and not database.exists():
                    raise MlflowException(f"there is no store {database} yet", RESOURCE_DOES_NOT_EXIST)
                _make_database(database)
            uri = database_uri(database, root)
        mlflow.set_tracking_uri(uri)
        yield database


def _make_database(database: Path) -> None:
    """Make an empty store if there is none; a process that is killed meanwhile leaves none."""
    if database.exists():
        return check_database(database)
    unfinished = database.with_name(f"{database.name}.partial")
    unfinished.unlink(missing_ok=True)
    check_database(unfinished)
    mlflow.set_tracking_uri(database_uri(unfinished, main_root()))
    mlflow.MlflowClient().search_experiments()
    unfinished.replace(database)


def _open_experiment(database: Path | None) -> str:
    """Return the experiment's id, making it if need be; the paths in a database in the checkout are made relative."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        (main_root() / RECEIPT.relative_to(ROOT)).unlink(missing_ok=True)  # it spoke of another store
        location = (database.parent / ARTIFACTS).as_uri() if database else None
        experiment = client.get_experiment(client.create_experiment(EXPERIMENT, artifact_location=location))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    location = str(experiment.artifact_location)
    is_ours = location.startswith("file:") and location.endswith(f"/{ARTIFACTS}")  # no server has made it
    if is_ours and database and database.is_relative_to(main_root()):
        make_paths_relative(database, location)
    return experiment.experiment_id


class Tracker:
    """Logs metrics to one run, in batches, and never a point of a curve that the run has already."""

    def __init__(self, run: Run) -> None:
        self._run_id = run.info.run_id
        self._client = mlflow.MlflowClient()
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        self._known = {
            (name, point.step)
            for name in run.data.metrics
            for point in self._client.get_metric_history(self._run_id, name)
        }

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log the values of some metrics after `step` optimizer steps."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if (name, step) not in self._known:
                self._buffer.append(Metric(name, value, now, step))
                self._known.add((name, step))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        points, self._buffer = self._buffer, []
        self._flushed = time.monotonic()
        for start in range(0, len(points), BATCH_LIMIT):
            self._client.log_batch(self._run_id, metrics=points[start : start + BATCH_LIMIT])


@contextlib.contextmanager
def training_run(params: Params) -> Iterator[LogMetrics]:
    """Open the run that a training logs to, or one that register never completed; yield the function that logs to it.

    From here on the run is incomplete until register has been run, so register's receipt is withdrawn. A store that
    fails stops the logging, not the training: register completes the run from the files.
    """
    RECEIPT.unlink(missing_ok=True)
    tracker: Tracker | None = None
    run = contextlib.ExitStack()
    outcome: Any = (None, None, None)

    def attempt(action: Callable[[], Any]) -> None:
        nonlocal tracker
        try:
            action()
        except Exception as error:  # also what a database's driver may raise
            _warn(error)
            tracker = None

    def open_run() -> None:
        nonlocal tracker
        tracker = Tracker(run.enter_context(_open_run(params)))

    def log_metrics(step: int, metrics: dict[str, float]) -> None:
        if tracker:
            attempt(partial(tracker.log_metrics, step, metrics))

    attempt(open_run)
    try:
        yield log_metrics
    except BaseException:
        outcome = sys.exc_info()
        raise
    finally:
        if tracker:
            attempt(tracker.flush)
        attempt(partial(run.__exit__, *outcome))  # the store may be back


@contextlib.contextmanager
def mirror_run(params: Params, model_sha256: str) -> Iterator[Run]:
    """Open the run of the pipeline's present files, completed from them, or made anew if the store has none.

    Raises UserError or OSError if a file is missing, UserError if one is broken or the store fails.
    """
    try:
        metrics, curves, documents = _final_metrics(), read_curves(PLOTS), pd.read_csv(TOKENS / "documents.csv")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the results cannot be read ({error}); run `dvc repro`") from None
    tables = (METRICS / "evaluate.json", METRICS / "sample.json", SAMPLES / "samples.csv", TOKENS / "meta.json")
    results = hash_of([model_sha256, *(sha256_of(path) for path in tables)])
    try:
        with _open_run(params, results) as run:
            tracker = Tracker(run)
            for name, points in curves.items():
                for step, value in points:
                    tracker.log_metrics(step, {name: value})
            tracker.log_metrics(params.train.max_steps, metrics)
            tracker.flush()
            mlflow.set_tags({MODEL_SHA256: model_sha256, RESULTS_KEY: results})
            _log_files(run)
            if not (run.inputs and run.inputs.dataset_inputs):
                digest = read_json(TOKENS / "meta.json")["splits"]["train"]["sha256"][:32]
                corpus = from_pandas(documents, name=params.prepare.source, digest=digest)
                mlflow.log_input(corpus, context="training")
            yield run
    except STORE_ERRORS as error:
        raise UserError(f"MLflow's store fails ({error}); run `dvc repro` again when it is back") from None


def _log_files(run: Run) -> None:
    mlflow.log_artifact(str(PARAMS), "config")
    for folder in (METRICS, PLOTS, SAMPLES):
        mlflow.log_artifacts(str(folder), folder.name)
    logged = mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="samples") or []
    if SAMPLES_TABLE not in {file.path for file in logged}:  # log_table would append to it
        blank = {name: [""] for name in ("top_k", "top_p", "min_p")}
        samples = pd.read_csv(SAMPLES / "samples.csv", keep_default_na=False, na_values=blank)
        mlflow.log_table(samples, SAMPLES_TABLE)


@contextlib.contextmanager
def _open_run(params: Params, results: str | None = None) -> Iterator[Run]:
    """Open the latest run that fits, or a new one.

    For a training (no results yet), it has the same parameters and has not been completed by register: a run of the
    same experiment, or an unfinished one, which is dead, since only one process at a time runs a training.
    With results, it has these or none yet; outside experiments, an experiment's finished run will do.
    """
    name, key = experiment_name(), train_key(params)
    tags = {TRAIN_KEY: key, RUN_KEY: run_key(params, key)}
    tags[MLFLOW_RUN_NAME] = name or f"repro-{tags[RUN_KEY][:8]}"
    if name:
        tags[EXPERIMENT_NAME] = name
    if commit := git_commit():
        tags[COMMIT] = commit
    if results is None:
        tags[ENVIRONMENT] = _environment(choose_device(params.runtime.device))

    def fits(run: Run) -> bool:
        same_experiment = run.data.tags.get(EXPERIMENT_NAME) == name
        if results is None:
            return RESULTS_KEY not in run.data.tags and (same_experiment or run.info.status != "FINISHED")
        is_ours = same_experiment or (name is None and run.info.status == "FINISHED")
        return is_ours and run.data.tags.get(RESULTS_KEY, results) == results

    with open_store() as experiment_id:
        runs = mlflow.MlflowClient().search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{tags[RUN_KEY]}'")
        found = next(filter(fits, runs), None)
        with mlflow.start_run(
            run_id=found.info.run_id if found else None,
            experiment_id=experiment_id,
            tags=None if found and results else tags,
            log_system_metrics=results is None,
        ) as run:
            if results is None and name is None and found and EXPERIMENT_NAME in found.data.tags:
                mlflow.delete_tag(EXPERIMENT_NAME)
            mlflow.log_params(_shown_params(params))
            try:
                yield mlflow.get_run(run.info.run_id)
            except (KeyboardInterrupt, SystemExit):
                mlflow.end_run("KILLED")
                raise


def _environment(device: torch.device) -> str:
    """Return what a training's bytes depend on besides its inputs, in words."""
    match device.type:
        case "cuda":
            hardware = torch.cuda.get_device_name(device)
        case "cpu":
            hardware = torch.backends.cpu.get_cpu_capability()
        case other:
            hardware = other
    return f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}, {hardware}"


def _shown_params(params: Params) -> dict[str, str]:
    flat = flatten(params.model_dump(by_alias=True, exclude_none=True))
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into one level: {"train": {"seed": 1}} becomes {"train.seed": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _final_metrics() -> dict[str, float]:
    """Return what has one value for a run: the test split's scores, the samples' and the training's size."""
    evaluated, sampled, trained = (read_json(METRICS / f"{stage}.json") for stage in ("evaluate", "sample", "train"))
    return {
        **{f"test/{name}": evaluated[name] for name in ("loss", "perplexity", "bits_per_byte")},
        **{f"sample/{name}": value for name, value in sampled.items() if name != "model"},
        **{f"train/{name}": trained[name] for name in ("tokens", "peak_memory_bytes")},
        "model/parameters": trained["parameters"],
    }


def _warn(error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"warning: MLflow's store fails, so training goes on without it ({message})", file=sys.stderr)
