"""Models by the names that a user may give: a path, an MLflow URI, or a name on Hugging Face's hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from gpt2.config import ModelConfig
from gpt2.core.environment import MLFLOW_DEFAULTS
from gpt2.core.errors import UserError
from gpt2.core.files import read_json
from gpt2.core.paths import ROOT, main_root
from gpt2.data.batches import SeenMask
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import CONFIG, load_model, weights_sha256


@dataclass(frozen=True)
class Parent:
    """The model that a training starts from, as train.init_from names it."""

    name: str
    sha256: str  # of its weights
    model: GPT2Model
    config: ModelConfig
    seen: SeenMask | None


def load_named(name: str) -> tuple[GPT2Model, ModelConfig, SeenMask | None]:
    """Return the model that a path, models:/, runs:/ or hf: names, as load_model does. Raises UserError."""
    if name.startswith(("models:", "runs:")):
        os.environ.update(MLFLOW_DEFAULTS | os.environ)
        from gpt2.tracking.registry import fetch_model  # MLflow takes as long to import as PyTorch

        return load_model(fetch_model(name))
    if name.startswith("hf:") or _is_huggingface_folder(Path(name)):
        from gpt2.model.huggingface import load_huggingface  # type: ignore[import-not-found,unused-ignore]

        return *load_huggingface(name.removeprefix("hf:")), None
    return load_model(Path(name))


def load_parent(name: str) -> Parent:
    """Load what train.init_from names. Raises UserError, also for an alias: equal parameters give equal results."""
    if name.startswith("models:/") and ("@" in name or name.endswith("/latest")):
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
    model, config, seen = load_named(found)
    return Parent(name, weights_sha256(model, config), model, config, seen)


def _is_huggingface_folder(path: Path) -> bool:
    """Tell whether a folder's configuration is of Hugging Face's kind, not of ours."""
    raw = read_json(path / CONFIG) if (path / CONFIG).exists() else None
    return isinstance(raw, dict) and "model_type" in raw
