"""The SQLite file of an MLflow store: whether it can be used, its address, and paths that move with a checkout."""

import sqlite3
from contextlib import closing
from pathlib import Path

ARTIFACTS = "mlartifacts"  # the folder beside it
PATH_COLUMNS = (  # where MLflow holds the paths of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def check_database(path: Path) -> None:
    """Let SQLite say at once that it cannot open it, where MLflow would try for minutes.

    Raises sqlite3.Error.
    """
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA schema_version")


def database_uri(path: Path, root: Path) -> str:
    """Return MLflow's address of a database: below `root` relative to it, since MLflow knows no path with a ? or %."""
    return f"sqlite:///{(path.relative_to(root) if path.is_relative_to(root) else path).as_posix()}"


def make_paths_relative(path: Path, prefix: str) -> None:
    """Shorten the absolute paths that MLflow gives a new experiment, and what runs have made of them.

    `prefix` is the folder of artifacts as it stands there. Raises sqlite3.Error.
    """
    with closing(sqlite3.connect(path)) as connection, connection:
        for table, column in PATH_COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                (ARTIFACTS, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
            )
