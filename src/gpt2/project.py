"""Where things are: the pipeline's files below this checkout, and the main checkout that experiments share."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params.yaml"
DATA = ROOT / "data"
TOKENS = DATA / "tokens"
MODEL = DATA / "model"
METRICS = DATA / "metrics"
PLOTS = DATA / "plots"
SAMPLES = DATA / "samples"
CHECKOUT_LOCK = ROOT / ".cache" / "train.lock"
RECEIPT = ROOT / "mlartifacts" / "receipt.json"

_EXPERIMENTS = (".dvc", "tmp", "exps")


def main_root() -> Path:
    """Return the checkout whose MLflow store is used.

    A queued or --temp experiment runs in a clone inside the main checkout, which is deleted at its end.
    """
    for folder in ROOT.parents:
        if folder.parts[-3:] == _EXPERIMENTS:
            return folder.parents[2]
    return ROOT


def experiment_name() -> str | None:
    """Return the name of the DVC experiment that runs this process, if one does."""
    return os.environ.get("DVC_EXP_NAME") or None


def training_state(train_key: str) -> Path:
    """Return the folder of the checkpoints of the training with this key, shared by all experiments."""
    return main_root() / ".cache" / "train" / train_key
