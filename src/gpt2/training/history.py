"""The history of a training's metrics as CSV files, one a curve: what `dvc plots` shows and MLflow mirrors."""

import csv
from collections.abc import Callable
from pathlib import Path

from gpt2.core.files import write_text

CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "val/loss")
Points = list[tuple[int, float]]
History = list[tuple[int, dict[str, float]]]  # step and metrics
LogMetrics = Callable[[int, dict[str, float]], None]


def write_curves(history: History, folder: Path) -> None:
    """Write each curve of a history of (step, metrics), e.g. "val/loss" to folder/val_loss.csv."""
    for name in CURVES:
        column = name.split("/")[1]
        rows = [f"{step},{metrics[name]}" for step, metrics in history if name in metrics]
        write_text(_path(name, folder), "\n".join([f"step,{column}", *rows, ""]))


def read_curves(folder: Path) -> dict[str, Points]:
    """Return the (step, value) points of every curve in folder. Raises OSError or ValueError."""
    return {name: _read(_path(name, folder)) for name in CURVES}


def _path(name: str, folder: Path) -> Path:
    return folder / f"{name.replace('/', '_')}.csv"


def _read(path: Path) -> Points:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        if next(rows, None) is None:
            raise ValueError(f"{path} is empty")
        return [(int(step), float(value)) for step, value in rows]
