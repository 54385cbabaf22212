"""Where things are: the pipeline's files below this checkout, and the main checkout that experiments share."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PARAMS = ROOT / "params.yaml"
DATA = ROOT / "data"
TOKENS = DATA / "tokens"
MODEL = DATA / "model"
LINEAGE = DATA / "lineage.json"
METRICS = DATA / "metrics"
PLOTS = DATA / "plots"
SAMPLES = DATA / "samples"
REPORT = DATA / "report"
CHECKOUT_LOCK = ROOT / ".cache" / "train.lock"
RECEIPT = ROOT / "mlartifacts" / "receipt.json"
TOKENIZER_FILE = "tokenizer.tiktoken"  # in TOKENS and in a model's folder, where it is not GPT-2's

_EXPERIMENTS = (".dvc", "tmp", "exps")


def main_root() -> Path:
    """Return the main checkout: this one, or the one inside which an experiment has its own for a while.

    MLflow's store and .cache are the main checkout's, but for the lock on this checkout's training.
    """
    for folder in ROOT.parents:
        if folder.parts[-3:] == _EXPERIMENTS:
            return folder.parents[2]
    return ROOT


def experiment_name() -> str | None:
    """Return the name of the DVC experiment that runs this process, if one does."""
    return os.environ.get("DVC_EXP_NAME") or None
