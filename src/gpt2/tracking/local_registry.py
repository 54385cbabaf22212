"""A registered model in this checkout's own store, found without MLflow, whose import takes as long as PyTorch's."""

import os
import re
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gpt2.core.errors import UserError
from gpt2.core.paths import MODEL, main_root
from gpt2.model.weights import read_config

MODEL_SHA256 = "gpt2.model_sha256"  # the tag of runs, logged models and versions that says which weights they have
# What MLflow's SQLAlchemy store asks of the same tables.
QUERY = """
SELECT coalesce(storage_location, source), value
FROM model_versions JOIN model_version_tags USING (workspace, name, version)
WHERE workspace = 'default' AND name = :name AND key = :key AND current_stage != 'Deleted_Internal'
AND version = coalesce(:version, (
    SELECT version FROM registered_model_aliases WHERE workspace = 'default' AND name = :name AND alias = :alias
))
"""


def find_model(uri: str) -> Path | None:
    """Return the model folder behind models:/name/version or models:/name@alias, if it is where its store says.

    None where registry.fetch_model has to ask MLflow: for other URIs and stores, paths to be mended, and mistakes,
    which it tells.
    """
    parts = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))", uri)
    if not parts or os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI"):
        return None
    root = main_root()
    with suppress(sqlite3.Error, OSError, UserError):
        with closing(sqlite3.connect(f"{(root / 'mlflow.db').as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute(QUERY, parts.groupdict() | {"key": MODEL_SHA256}).fetchone()
        if found and str(found[0]).startswith(f"{root.as_uri()}/"):
            folder = Path(unquote(urlsplit(found[0]).path)).resolve() / "artifacts" / MODEL.name
            if read_config(folder)[1] == found[1]:
                return folder
    return None
