"""Models by the names that a user may give: a path, an MLflow URI, or a name on Hugging Face's hub."""

import os
from pathlib import Path
from typing import NamedTuple

from gpt2.config import ModelConfig
from gpt2.core.environment import MLFLOW_DEFAULTS
from gpt2.core.errors import UserError
from gpt2.core.files import read_json
from gpt2.core.paths import ROOT, TOKENIZER_FILE, main_root
from gpt2.data.batches import SeenMask
from gpt2.data.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
from gpt2.export.tokenizer import vocabulary_of
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import CONFIG, load_model, weights_sha256
from gpt2.tracking.local_registry import find_model


class NamedModel(NamedTuple):
    """A model on the CPU, ready to generate, and what its files tell."""

    path: Path  # its folder or file
    model: GPT2Model
    config: ModelConfig
    seen: SeenMask | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside it, or GPT-2's. Raises UserError if that has another vocabulary."""
        return load_tokenizer(self.path, self.config.vocab_size)

    @property
    def sha256(self) -> str:
        """The SHA-256 of its weights as a model folder would hold them."""
        return weights_sha256(self.model, self.config)


def load_named(name: str) -> NamedModel:
    """Load the model that a path, models:/, runs:/ or hf: names. Raises UserError."""
    path = Path(name)
    if name.startswith(("models:", "runs:")):
        path = find_model(name) or _ask_mlflow(name)
    elif name.startswith("hf:") or _is_huggingface_folder(path):
        from gpt2.model.huggingface import TOKENIZER, load_huggingface

        named = NamedModel(*load_huggingface(name), None)
        _check_tokenizer(named.path, TOKENIZER)
        return named
    return NamedModel(path, *load_model(path))


def _ask_mlflow(uri: str) -> Path:
    os.environ.update(MLFLOW_DEFAULTS | os.environ)
    from gpt2.tracking.registry import fetch_model  # MLflow takes as long to import as PyTorch

    return fetch_model(uri)


def load_parent(name: str) -> NamedModel:
    """Load what train.init_from names. Raises UserError, also for an alias: equal parameters give equal results."""
    if name.startswith("models:/") and ("@" in name or name.lower().endswith("/latest")):
        from gpt2.tracking.registry import open_version, uri_of

        with open_version(name) as version:
            raise UserError(f"train.init_from {name} may name another version tomorrow: write {uri_of(version)}")
    found = name
    if name.startswith("data/"):
        found = str(ROOT / name)
        if not Path(found).exists() and (main_root() / name).exists():
            raise UserError(
                f"{name} is not in the experiment's own folder, which has only what git and DVC track: "
                f"run `dvc add {name}` and commit {name}.dvc"
            )
    return load_named(found)


def _check_tokenizer(folder: Path, name: str) -> None:
    """Raise UserError if a folder of Hugging Face's has another tokenizer than GPT-2's, unless it is of export.py."""
    if (folder / name).exists() and not (folder / TOKENIZER_FILE).exists():
        raw = read_json(folder / name)
        if not isinstance(raw, dict) or raw.get("model", {}).get("vocab") != vocabulary_of(gpt2_tokenizer().encoding):
            raise UserError(f"{folder / name} is not GPT-2's tokenizer")


def _is_huggingface_folder(path: Path) -> bool:
    """Tell whether a folder's configuration is of Hugging Face's kind, not of ours."""
    raw = read_json(path / CONFIG) if (path / CONFIG).exists() else None
    return isinstance(raw, dict) and "model_type" in raw
