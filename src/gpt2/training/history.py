"""The history of a training's metrics as CSV files, one a curve: what `dvc plots` shows and MLflow mirrors."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from gpt2.core.files import write_text

CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "val/loss")
Points = list[tuple[int, float]]
History = list[tuple[int, dict[str, float]]]  # step and metrics
LogMetrics = Callable[[int, dict[str, float]], None]
LogWeights = Callable[[int], None]


def write_curves(history: History, folder: Path) -> None:
    """Write each curve of a history of (step, metrics), e.g. "val/loss" to folder/val_loss.csv."""
    for name in CURVES:
        points = [(step, metrics[name]) for step, metrics in history if name in metrics]
        table = pd.DataFrame(points, columns=["step", name.split("/")[1]])
        write_text(folder / f"{name.replace('/', '_')}.csv", table.to_csv(index=False))


def read_curves(folder: Path) -> dict[str, Points]:
    """Return the (step, value) points of every curve in folder. Raises OSError or ValueError."""
    curves = {}
    for name in CURVES:
        types = {"step": int, name.split("/")[1]: float}
        table = pd.read_csv(folder / f"{name.replace('/', '_')}.csv", dtype=types, na_filter=False)
        curves[name] = list(table.itertuples(index=False, name=None))
    return curves
