"""MLflow's store: connect to it, make it if need be, and mend its paths after it was moved.

It is what MLFLOW_TRACKING_URI names, else mlflow.db in the main checkout. Artifacts lie beside an SQLite database, in
the folder mlartifacts. Their paths in the database are absolute, as MLflow expects.
"""

import json
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from google.protobuf.json_format import ParseError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE as NOTE
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from gpt2.core.errors import UserError, one_line
from gpt2.core.files import file_lock
from gpt2.core.paths import RECEIPT, ROOT, main_root

EXPERIMENT = "gpt2"
ARTIFACTS = "mlartifacts"
ABOUT = """\
A run for each training of the pipeline, and its results.

- **Charts** compare the runs: training and validation loss (dashed) as curves, results of the whole run as bars.
- **Columns** of the table: `model.*` and `train.*` are the parameters; a run's description says what it changed.
- **Compare** shows the parameters of two runs side by side, **Artifact view** (`samples/samples.json`) their texts.
- **Artifacts** of a run: parameters and lineage in `config`, figures in `report`, texts in `samples`.
- **Models**: the registered model of this name has a version for each set of weights; the best one is the champion.
"""
# A view of the charts as MLflow's own button "Share" keeps it: both losses on one chart, above those of all metrics.
VIEW = "losses"
BOTH_LOSSES = {
    "uuid": "losses",
    "type": "LINE",
    "metricSectionId": "losses",
    "metricKey": "train/loss",
    "selectedMetricKeys": ["train/loss", "val/loss"],
    "xAxisKey": "step",
    "lineSmoothness": 0,
    "runsCountToCompare": 100,
}
SECTION = {"uuid": "losses", "name": "Loss", "display": True, "columns": 1, "cardHeight": 360}
EXPERIMENT_TAGS = {
    NOTE: ABOUT,
    f"mlflow.sharedViewState.{VIEW}": json.dumps({"compareRunCharts": [BOTH_LOSSES], "compareRunSections": [SECTION]}),
}
PATH_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
STORE_ERRORS: tuple[type[Exception], ...] = (
    MlflowException,
    SQLAlchemyError,
    sqlite3.Error,
    ParseError,  # what answers is no server of MLflow's
    ImportError,  # a store's driver is not installed
)
with suppress(ImportError):  # only who keeps artifacts on S3 has these
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    STORE_ERRORS += (Boto3Error, BotoCoreError, ClientError)


def store_lock() -> AbstractContextManager[None]:
    """Return the lock under which processes of this checkout and its experiments change the store's structure."""
    return file_lock(main_root() / ".cache" / "mlflow.lock", "another process changes MLflow's store")


def open_store() -> str:
    """Connect to the store to write, and return the id of our experiment.

    A missing store is made, and the paths of a moved one are mended. Raises one of STORE_ERRORS.
    """
    uri, database = _locate()
    _connect(uri)
    with store_lock():  # processes that make a database at once would break it
        if database and database.exists():
            mend_paths(database, database.parent)
        elif database:  # a process that is killed meanwhile leaves none
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # a server's client does without it

            unfinished = database.with_name(f"{database.name}.partial")
            unfinished.write_bytes(b"")
            SqlAlchemyStore(_uri_of(unfinished), (database.parent / ARTIFACTS).as_uri())
            unfinished.replace(database)
        client = _client()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            withdraw_receipt()  # it is of another store
            location = (database.parent / ARTIFACTS).as_uri() if database else None
            try:
                return client.create_experiment(EXPERIMENT, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException:
                experiment = client.get_experiment_by_name(EXPERIMENT)  # a colleague may have made it meanwhile
                if experiment is None:
                    raise
        for name in EXPERIMENT_TAGS.keys() - experiment.tags.keys():
            client.set_experiment_tag(experiment.experiment_id, name, EXPERIMENT_TAGS[name])
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id


def charts_address(experiment_id: str) -> str:
    """Return where a browser shows the charts of the experiment's runs, and the command that serves it."""
    uri, database = _locate()
    view = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    page = f"#/experiments/{experiment_id}/runs?{view}"
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/{page}"
    is_default = database == main_root() / "mlflow.db"
    command = "mlflow ui" if is_default else 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return f"`{command}`, then http://127.0.0.1:5000/{page}"


def withdraw_receipt() -> None:
    """Let the next `dvc repro` run register, since the store is not as register left it."""
    with suppress(OSError):  # the checkout may be read-only
        (main_root() / RECEIPT.relative_to(ROOT)).unlink(missing_ok=True)


@contextmanager
def read_store() -> Iterator[None]:
    """Connect to the store to read it. Raises one of STORE_ERRORS, also if there is none.

    It may be read-only, or moved and not mended, so MLflow gets a mended copy of its database.
    """
    uri, database = _locate()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "mlflow.db"
        if database:
            if not database.exists():
                raise MlflowException(f"there is no store {database} yet", RESOURCE_DOES_NOT_EXIST)
            with closing(_open(database)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            mend_paths(copy, database.parent)
        _connect(_uri_of(copy) if database else uri)
        _client()
        try:
            yield
        finally:
            mlflow.set_tracking_uri(uri)


def repair() -> str:
    """Mend the paths of a moved store; return what was done, in one line. Raises UserError."""
    uri, database = _locate()
    if database is None:
        return one_line(f"nothing to repair: {uri} is not an SQLite database")
    try:
        with store_lock():
            count = mend_paths(database, database.parent)
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"{database} cannot be repaired ({error})") from None
    return f"mended {count} paths in {database}" if count else f"nothing to repair: the paths in {database} are right"


def mend_paths(database: Path, root: Path) -> int:
    """Let the paths below the folder in which a store was made begin with `root`; return how many were changed.

    Others stay, as do all if our experiment keeps its artifacts elsewhere, e.g. with a server. Raises sqlite3.Error, at
    once if this is no database of MLflow's, which itself would try for minutes.
    """
    ours = (root / ARTIFACTS).as_uri()
    with closing(_open(database)) as connection, connection:
        found = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
        location = str(found[0]) if found else ours
        old = location.removesuffix(f"/{ARTIFACTS}")
        if location == ARTIFACTS:  # an earlier version of this project made paths relative
            prefixes = {location: ours}
        elif location.startswith("file:") and location not in (old, ours):
            prefixes = {old: root.as_uri(), local_file_uri_to_path(old): str(root)}  # MLflow writes either
        else:
            return 0
        return sum(
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                (new, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
            ).rowcount
            for table, column in PATH_COLUMNS
            for prefix, new in prefixes.items()
        )


def _locate() -> tuple[str, Path | None]:
    """Return the store's URI, and the path of its database if that is an SQLite file."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("http") and "@" in (server := urlsplit(uri)).netloc:  # MLflow prints the address as it is
        names = ("MLFLOW_TRACKING_USERNAME", server.username), ("MLFLOW_TRACKING_PASSWORD", server.password)
        os.environ.update({name: unquote(value) for name, value in names if value is not None})
        uri = server._replace(netloc=server.netloc.rpartition("@")[2]).geturl()
    if not uri.startswith("sqlite"):
        return uri, None
    # A relative path counts from the main checkout: DVC deletes the folder in which an experiment runs.
    database = main_root() / (make_url(uri).database or "")
    return _uri_of(database), database


def _uri_of(database: Path) -> str:
    """Return the URI of an SQLite file, with its driver: without, MLflow makes a folder of the path as it is quoted."""
    return URL.create("sqlite+pysqlite", database=str(database)).render_as_string()


def _open(database: Path) -> sqlite3.Connection:
    """Open a database that is there. Where it may not be written, SQLite opens it for reading."""
    return sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)


def _connect(uri: str) -> None:
    """Let MLflow use a store, without its advice and repeated errors."""
    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # its errors are raised as well
    warnings.filterwarnings("ignore", module=r"mlflow\.")  # advice on schemas and input examples
    mlflow.set_tracking_uri(uri)


def _client() -> mlflow.MlflowClient:
    """Return a client of the store. Raises MlflowException if its URI is none, or its driver is not installed.

    Raises SQLAlchemyError if a database does not answer or refuses, at once: MLflow itself would try for minutes.
    """
    uri = mlflow.get_tracking_uri()
    try:
        if uri.startswith(("postgresql", "mysql", "mssql")):
            create_engine(uri, poolclass=NullPool).connect().close()
        return mlflow.MlflowClient()
    except (ImportError, OSError, ValueError) as error:
        raise MlflowException(f"MLFLOW_TRACKING_URI cannot be used: {error}") from None  # it may have a password
