"""Runs in MLflow: a live view of training, and the mirror of the pipeline's files, which can be rebuilt from them."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Metric, Run
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from gpt2.config import Params, SamplingParams
from gpt2.core.errors import UserError, one_line
from gpt2.core.files import read_json, sha256_of
from gpt2.core.paths import LINEAGE, METRICS, MODEL, PARAMS, PLOTS, RECEIPT, REPORT, SAMPLES, TOKENS, experiment_name
from gpt2.evaluation.text_metrics import describe_settings
from gpt2.tracking.datasets import split_datasets
from gpt2.tracking.lineage import Lineage, changes_since_commit, flatten, hash_of, run_key
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.logged_models import log_checkpoint
from gpt2.tracking.store import STORE_ERRORS, open_store
from gpt2.training.history import CURVES, LogMetrics, read_curves

WriteModel = Callable[[Path], object]  # writes a model folder
LogModel = Callable[[int, WriteModel], None]
NO_LOG: tuple[LogMetrics, LogModel] = (lambda step, metrics: None), (lambda step, write_model: None)
FLUSH_SECONDS = 5  # a write to the store costs as much as a small training step
BATCH_LIMIT = 1000  # points in one call, MLflow's own limit
SAMPLES_TABLE = "samples/samples.json"
SYSTEM_METRICS = "system/"

TRAIN_KEY, RUN_KEY, RESULTS_KEY = "gpt2.train_key", "gpt2.run_key", "gpt2.results_key"
EXPERIMENT_NAME, COMMIT, UNCOMMITTED = "dvc.experiment", "mlflow.source.git.commit", "gpt2.uncommitted"
ENVIRONMENT, THREADS = "gpt2.environment", "gpt2.threads"
PARENT, PARENT_SHA256 = "gpt2.parent", "gpt2.parent_sha256"
STATE = "optuna.state"  # of a sweep's trial that has ended
# What another program has set for its own run, and MLflow would take for ours.
FOREIGN = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ACTIVE_MODEL_ID")


class Tracker:
    """Logs metrics to one run in batches, and skips points that the run has already."""

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

    def log_weights(self, step: int, write_model: WriteModel) -> None:
        """Log the weights after `step` optimizer steps as a model, with the metrics that were logged of that step."""
        self.flush()
        with TemporaryDirectory() as folder:
            write_model(Path(folder) / MODEL.name)
            log_checkpoint(self._run_id, Path(folder) / MODEL.name, step)

    def flush(self) -> None:
        """Write what is buffered."""
        points, self._buffer = self._buffer, []
        self._flushed = time.monotonic()
        for start in range(0, len(points), BATCH_LIMIT):
            self._client.log_batch(self._run_id, metrics=points[start : start + BATCH_LIMIT])


@contextmanager
def training_run(params: Params, lineage: Lineage) -> Iterator[tuple[LogMetrics, LogModel]]:
    """Open the run that a training logs to, or resume one that register never completed; yield the functions that log.

    The run is incomplete until register has been run, so register's receipt is withdrawn. A store that fails stops the
    logging, not the training: register completes the run from the files. What is no curve is left to register.
    """
    RECEIPT.unlink(missing_ok=True)
    tracker: Tracker | None = None
    run = ExitStack()

    def attempt(action: Callable[[], Any]) -> Any:
        nonlocal tracker
        try:
            return action()
        except Exception as error:  # also what a database's driver may raise
            told = one_line(f"warning: MLflow's store fails, so training continues without it ({error})")
            print(told, file=sys.stderr)
            tracker = None

    def log_metrics(step: int, metrics: dict[str, float]) -> None:
        if tracker:
            curves = {name: value for name, value in metrics.items() if name in CURVES}
            attempt(partial(tracker.log_metrics, step, curves))

    def log_weights(step: int, write_model: WriteModel) -> None:
        if tracker:
            attempt(partial(tracker.log_weights, step, write_model))

    tracker = attempt(lambda: Tracker(run.enter_context(_open_run(params, lineage))))
    try:
        yield log_metrics, log_weights
    finally:
        outcome = sys.exc_info()
        if tracker:
            attempt(tracker.flush)
        attempt(partial(run.__exit__, *outcome))  # the store may be back


@contextmanager
def mirror_run(params: Params, lineage: Lineage, model_sha256: str) -> Iterator[Run]:
    """Open the run of the pipeline's present files, and complete it from them; make it if the store has none.

    Raises UserError or OSError if a file is missing, UserError if one is broken or the store fails.
    """
    try:
        metrics, curves = _final_metrics(), read_curves(PLOTS)
        parameters = json.dumps(read_json(METRICS / "train.json")["parameters"])
        blank = {name: [""] for name in ("top_k", "top_p", "min_p")}
        samples = _readable(pd.read_csv(SAMPLES / "samples.csv", keep_default_na=False, na_values=blank))
        datasets = split_datasets(params.prepare.source)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the results cannot be read ({error}); run `dvc repro`") from None
    tables = (METRICS / "evaluate.json", METRICS / "sample.json", SAMPLES / "samples.csv", TOKENS / "meta.json")
    results = hash_of([model_sha256, *(sha256_of(path) for path in tables)])
    try:
        with _open_run(params, lineage, results) as run:
            tracker = Tracker(run)
            for name, points in curves.items():
                for step, value in points:
                    tracker.log_metrics(step, {name: value})
            # At one step that all runs share, MLflow draws a bar for each run.
            tracker.log_metrics(0, {name: value for name, value in metrics.items() if name not in run.data.metrics})
            tracker.flush()
            mlflow.log_param("model.parameters", parameters)
            mlflow.set_tags({MODEL_SHA256: model_sha256, RESULTS_KEY: results})
            mlflow.log_artifact(str(PARAMS), "config")
            for folder in (METRICS, PLOTS, SAMPLES, REPORT):
                if folder.exists():
                    mlflow.log_artifacts(str(folder), folder.name)
            logged = mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="samples") or []
            if SAMPLES_TABLE not in {file.path for file in logged}:  # log_table would append to it
                mlflow.log_table(samples, SAMPLES_TABLE)
            mlflow.log_inputs(list(datasets.values()), list(datasets), [None] * len(datasets))  # those it has stay
            yield run
    except STORE_ERRORS as error:
        raise UserError(f"MLflow's store fails ({error}); run `dvc repro` again when it is back") from None


@contextmanager
def _open_run(params: Params, lineage: Lineage, results: str | None = None) -> Iterator[Run]:
    """Open the latest run of these parameters that fits, or a new one.

    A training resumes a run that register has not completed: one of the same experiment, or an unfinished one. (That is
    dead, since only one process at a time runs a training.) It leaves a sweep's trial that has ended. The mirror of
    results takes a run of the same experiment that has these results, or none yet; outside experiments, it takes an
    experiment's finished run too.
    """
    name = experiment_name()
    tags = lineage_tags(lineage) | {RUN_KEY: run_key(params, lineage["train_key"])}
    tags[MLFLOW_RUN_NAME] = name or f"repro-{tags[RUN_KEY][:8]}"
    if changes := changes_since_commit(params, lineage):
        tags[MLFLOW_RUN_NOTE] = changes
    if name:
        tags[EXPERIMENT_NAME] = name

    def fits(run: Run) -> bool:
        same, finished = run.data.tags.get(EXPERIMENT_NAME) == name, run.info.status == "FINISHED"
        if results is None:
            return not {RESULTS_KEY, STATE} & run.data.tags.keys() and (same or not finished)
        return (same or (name is None and finished)) and run.data.tags.get(RESULTS_KEY, results) == results

    experiment_id = open_store()
    runs = mlflow.MlflowClient().search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{tags[RUN_KEY]}'")
    found = next(filter(fits, runs), None)
    for variable in FOREIGN:
        os.environ.pop(variable, None)
    with mlflow.start_run(
        run_id=found.info.run_id if found else None,
        experiment_id=experiment_id,
        tags=None if found and results else tags,
        log_system_metrics=results is None,
    ) as run:
        if results is None and name is None and found and EXPERIMENT_NAME in found.data.tags:
            mlflow.delete_tag(EXPERIMENT_NAME)
        mlflow.log_dict(lineage, f"config/{LINEAGE.name}")
        flat = flatten(params.model_dump(by_alias=True, exclude_none=True))
        mlflow.log_params({key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()})
        try:
            yield mlflow.get_run(run.info.run_id)
        except (KeyboardInterrupt, SystemExit):
            mlflow.end_run("KILLED")
            raise


def lineage_tags(lineage: Lineage) -> dict[str, str]:
    """Return the tags of a run or a version that tell how its weights were made."""
    tags = {
        TRAIN_KEY: lineage["train_key"],
        COMMIT: lineage["commit"],
        UNCOMMITTED: " ".join(lineage["uncommitted"]),
        ENVIRONMENT: lineage["environment"],
        THREADS: str(lineage["threads"]),
        PARENT: lineage["train"].get("init_from"),  # which earlier versions lack
        PARENT_SHA256: lineage.get("parent_sha256"),
    }
    return {name: value for name, value in tags.items() if value}


def _final_metrics() -> dict[str, float]:
    """Return the metrics of the whole run: scores of the test split and the samples, and the size of the training."""
    evaluated, sampled, trained = (read_json(METRICS / f"{stage}.json") for stage in ("evaluate", "sample", "train"))
    found = {
        **{f"test/{name}": evaluated[name] for name in ("loss", "perplexity", "bits_per_byte")},
        **{f"sample/{name}": value for name, value in sampled.items() if name != "model"},
        **{f"train/{name}": trained[name] for name in ("tokens", "peak_memory_bytes", "kept_step")},
        "val/full_loss": trained["val_loss"],
        "val/sliding_loss": evaluated["val_loss"],
    }
    return {name: value for name, value in found.items() if value is not None}  # as a perplexity beyond a float is


def _readable(samples: pd.DataFrame) -> pd.DataFrame:
    """Put what MLflow's comparison of runs shows first: the texts, by prompt and settings."""
    settings = samples[[name for name in SamplingParams.model_fields if name in samples]]
    labels = [
        f"{prompt} [{describe_settings(row)}]"
        for prompt, row in zip(samples["prompt"], settings.to_dict("records"), strict=True)
    ]
    others = samples.drop(columns=["text"])
    others.insert(0, "prompt [settings]", labels)
    others.insert(1, "text", samples["text"])
    return others
