"""Datasets of the Hugging Face Hub, or in its formats in a folder, streamed by the library `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2.core.errors import UserError
from gpt2.data.readers import text_of, unreadable

PREFIX = "hf:"
_NAME = re.compile(rf"{PREFIX}([^:@]+)(?::([^:@]+))?(?:@(.+))?")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def open_dataset(source: str, root: Path) -> dict[str, Any]:
    """Return the splits, by name, of hf:owner/name[:config]@commit, or of hf:data/raw/folder; no row is read yet.

    The commit is needed, so that equal parameters give equal tokens. Raises UserError.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"prepare.source {source} needs the library datasets: run `pip install datasets`") from None
    found = _NAME.fullmatch(source)
    if not found:
        raise UserError(f"prepare.source {source} is not like hf:owner/name[:config]@commit or hf:data/raw/folder")
    name, config, commit = found.groups()
    try:
        if name.startswith("data/raw"):
            if any((root / name / file).exists() for file in _SAVED):
                splits = datasets.load_from_disk(root / name)
            else:
                splits = datasets.load_dataset(str(root / name), config, streaming=True)
        else:
            if not re.fullmatch("[0-9a-f]{40}", commit or ""):
                raise UserError(
                    f"prepare.source {source} may change: write {source.partition('@')[0]}@{_commit_of(name, commit)}"
                )
            splits = datasets.load_dataset(name, config, revision=commit, streaming=True)
    except UserError:
        raise
    except Exception as error:  # of many libraries
        raise _explain(source, error) from None
    return dict(splits) if isinstance(splits, dict) else {"train": splits}


def read_rows(rows: Any, column: str, source: str) -> Iterator[str]:
    """Yield the text column of each row of a split. Raises UserError."""
    if column in (rows.column_names or ()):  # the others need not be decoded
        rows = rows.select_columns([column])
    try:
        for row in rows:
            yield text_of(row, column, "a row")
    except ValueError as error:
        raise unreadable(f"prepare.source {source}", error) from None
    except Exception as error:
        raise _explain(source, error) from None


def _commit_of(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha or "<commit>"
    except Exception:  # without network
        return "<the 40 digits of a commit, from the history of its files on huggingface.co>"


def _explain(source: str, error: Exception) -> UserError:
    told = unreadable(f"prepare.source {source}", error)
    if source.startswith(f"{PREFIX}data/raw"):
        return told
    return UserError(
        f"{told} (without network, fetch the dataset elsewhere with `hf download --repo-type dataset`, "
        "put the folder below data/raw, and set prepare.source to it)"
    )
