"""Runs in MLflow: a live view of training, and the mirror of the pipeline's files, which can be rebuilt from them."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from filelock import FileLock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from gpt2.cli import UserError
from gpt2.config import Params, flatten
from gpt2.curves import read_curves
from gpt2.files import read_json
from gpt2.lineage import git_commit, run_key, train_key
from gpt2.project import METRICS, PARAMS, PLOTS, RECEIPT, SAMPLES, TOKENS, experiment_name, main_root

EXPERIMENT = "gpt2"
FLUSH_SECONDS = 5  # a write to the store costs as much as a small training step
BATCH_LIMIT = 1000  # points in one call, MLflow's own limit
STORE_ERRORS = (MlflowException, OSError)
SAMPLES_TABLE = "samples/samples.json"

LogMetrics = Callable[[int, dict[str, float]], None]

TRAIN_KEY, RUN_KEY, MODEL_SHA256 = "gpt2.train_key", "gpt2.run_key", "gpt2.model_sha256"
EXPERIMENT_NAME = "dvc.experiment"


@contextlib.contextmanager
def store_lock() -> Iterator[None]:
    """Keep other processes of this checkout and its experiments from changing the store's structure meanwhile."""
    path = main_root() / ".cache" / "mlflow.lock"
    path.parent.mkdir(exist_ok=True)
    with FileLock(path):
        yield


def connect() -> str:
    """Open the store, making it if need be, and return the id of the experiment.

    The store is the one that MLFLOW_TRACKING_URI names, else mlflow.db and mlartifacts/ in the main checkout.
    """
    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"mlflow\.")  # advice on schemas and input examples
    root = main_root()
    remote = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(remote or f"sqlite:///{(root / 'mlflow.db').as_posix()}")
    # Processes that make a database at once would break it, and its default experiment lands in the working directory.
    with store_lock(), contextlib.chdir(root):
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = None if remote else (root / "mlartifacts").as_uri()
            return client.create_experiment(EXPERIMENT, artifact_location=location)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id


class Tracker:
    """Logs metrics to one run, in batches, and never a point of a curve that the run has already."""

    def __init__(self, run: Run) -> None:
        self._run_id = run.info.run_id
        self._client = mlflow.MlflowClient()
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        self._last_step = {
            name: max(point.step for point in self._client.get_metric_history(self._run_id, name))
            for name in run.data.metrics
        }

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log the values of some metrics after `step` optimizer steps."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if step > self._last_step.get(name, -1):
                self._buffer.append(Metric(name, value, now, step))
                self._last_step[name] = step
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
    """Open the run in which a training logs, and yield what logs there; a run that died before its end is continued.

    From here on the run is incomplete until register has been run, so register's receipt is withdrawn. A store that
    fails stops the logging, not the training: register completes the run from the files.
    """
    RECEIPT.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        tracker: Tracker | None = None
        try:
            tracker = Tracker(stack.enter_context(_open_run(params, is_training=True)))
        except STORE_ERRORS as error:
            _warn(error)

        def log_metrics(step: int, metrics: dict[str, float]) -> None:
            nonlocal tracker
            try:
                if tracker:
                    tracker.log_metrics(step, metrics)
                    if step == params.train.max_steps:
                        tracker.flush()
            except STORE_ERRORS as error:
                _warn(error)
                tracker = None

        yield log_metrics


@contextlib.contextmanager
def mirror_run(params: Params, model_sha256: str) -> Iterator[Run]:
    """Open the run of the pipeline's present files, completed from them, or made anew if the store has none.

    Raises UserError if the store fails.
    """
    try:
        with _open_run(params, is_training=False) as run:
            _complete(run, params, model_sha256)
            yield run
    except STORE_ERRORS as error:
        raise UserError(f"MLflow's store fails ({error}); run `dvc repro` again when it is back") from None


def _complete(run: Run, params: Params, model_sha256: str) -> None:
    """Log what the run lacks of the pipeline's files."""
    tracker = Tracker(run)
    for name, points in read_curves(PLOTS).items():
        for step, value in points:
            tracker.log_metrics(step, {name: value})
    tracker.log_metrics(params.train.max_steps, _final_metrics())
    tracker.flush()
    mlflow.set_tag(MODEL_SHA256, model_sha256)
    if not (run.inputs and run.inputs.dataset_inputs):
        _log_dataset(params.prepare.source)
    mlflow.log_artifact(str(PARAMS), "config")
    for folder in (METRICS, PLOTS, SAMPLES):
        mlflow.log_artifacts(str(folder), folder.name)
    if not mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path=SAMPLES_TABLE):
        mlflow.log_table(pd.read_csv(SAMPLES / "samples.csv"), SAMPLES_TABLE)


@contextlib.contextmanager
def _open_run(params: Params, is_training: bool) -> Iterator[Run]:
    """Open the latest run of these parameters, or a new one; a training continues only a run that never ended."""
    experiment_id = connect()
    key = train_key(params)
    tags = {TRAIN_KEY: key, RUN_KEY: run_key(params, key), "mlflow.source.name": "dvc repro"}
    if name := experiment_name():
        tags[EXPERIMENT_NAME] = name
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    conditions = [f"tags.`{tag}` = '{tags[tag]}'" for tag in (RUN_KEY, EXPERIMENT_NAME) if tag in tags]
    if is_training:
        conditions.append("attributes.status = 'RUNNING'")
    found = mlflow.MlflowClient().search_runs([experiment_id], " and ".join(conditions), max_results=1)
    with mlflow.start_run(
        run_id=found[0].info.run_id if found else None,
        experiment_id=experiment_id,
        run_name=None if found else name or f"repro-{tags[RUN_KEY][:8]}",
        tags=None if found else tags,
        log_system_metrics=is_training,
    ) as run:
        if not found:
            mlflow.log_params(_shown_params(params))
        yield mlflow.get_run(run.info.run_id)


def _shown_params(params: Params) -> dict[str, str]:
    flat = flatten(params.model_dump(by_alias=True, exclude_none=True))
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}


def _final_metrics() -> dict[str, float]:
    """Return what has one value for a run: the test split's scores and the size of the training."""
    evaluated, trained = read_json(METRICS / "evaluate.json"), read_json(METRICS / "train.json")
    return {
        **{f"test/{name}": evaluated[name] for name in ("loss", "perplexity", "bits_per_byte")},
        **{f"train/{name}": trained[name] for name in ("tokens", "peak_memory_bytes")},
        "model/parameters": trained["parameters"],
    }


def _log_dataset(source: str) -> None:
    meta = read_json(TOKENS / "meta.json")
    digest = meta["splits"]["train"]["sha256"][:32]
    documents = from_pandas(pd.read_csv(TOKENS / "documents.csv"), name=source, digest=digest)
    mlflow.log_input(documents, context="training")


def _warn(error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"warning: MLflow's store fails, so training goes on without it ({message})", file=sys.stderr)
