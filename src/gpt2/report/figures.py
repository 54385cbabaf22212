"""The report's pictures: a function each, from a table to a figure that is readable on paper and on a phone."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

WIDTH = 4.8  # inches, so that a phone can show it
INK, PAPER, GREY = "#1b1f24", "#fffffe", "#8a8f98"  # for_page knows the first two
BLUE, ORANGE = "#3b82d6", "#e0762b"  # to be seen on white and on black
MOST_ROWS, MOST_CHARACTERS = 30, 32
STYLE = {
    "svg.hashsalt": "gpt2",  # else its ids are random
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.parse_math": False,  # documents may have dollars in their names
    "figure.constrained_layout.use": True,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # they name the version and the time


def draw_all(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Return as SVG all pictures that the tables have numbers for; equal tables give equal text."""
    with same_style(STYLE):
        return {name: _svg(draw(tables[table])) for name, (draw, table) in FIGURES.items() if table in tables}


@contextmanager
def same_style(*changes: dict[str, Any]) -> Iterator[None]:
    """Draw and save alike whatever a matplotlibrc says, and without warnings of characters that the font lacks."""
    with style.context(["default", *changes]), warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


def png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def for_page(svg: str) -> str:
    """Return a picture as an element of a page: text in the page's colour, no background."""
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")


def loss(table: pd.DataFrame) -> Figure:
    """Draw `training`'s losses over tokens."""
    figure = Figure((WIDTH, 3.4))
    axis = figure.subplots()
    _curve(axis, table, "train_loss", BLUE, "training (mean since the last point)")
    _curve(axis, table, "val_loss", ORANGE, "validation (a sample of the split)")
    start = tuple(table[["tokens", "val_loss"]].dropna().iloc[0])
    axis.annotate("start", start, xytext=(6, 5), textcoords="offset points", color=ORANGE)
    axis.set(xlabel="tokens trained on", ylabel="loss (nats per token)")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.margins(y=0.12)
    axis.legend()
    return figure


def optimization(table: pd.DataFrame) -> Figure:
    """Draw `training`'s learning rate and gradient norm over tokens."""
    figure = Figure((WIDTH, 3.8))
    above, below = figure.subplots(2, sharex=True)
    _curve(above, table, "train_learning_rate", BLUE)
    _curve(below, table, "train_grad_norm", BLUE)
    above.set(ylabel="learning rate", ylim=(0, None))
    below.set(ylabel="gradient norm", ylim=(0, None), xlabel="tokens trained on")
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def loss_by_position(table: pd.DataFrame) -> Figure:
    """Draw `by_position`: each position, and the means of positions 1, 2, 3-4, 5-8 and so on."""
    figure = Figure((WIDTH, 3.4))
    axis = figure.subplots()
    axis.plot(table["position"], table["loss"], ".", color=GREY, alpha=0.45, markersize=4, label="one position")
    octave = np.ceil(np.log2(table["position"])).astype(int)
    weighted = table["loss"] * table["tokens"]
    means = weighted.groupby(octave).sum() / table["tokens"].groupby(octave).sum()
    middle = np.exp(np.log(table["position"]).groupby(octave).mean())
    axis.plot(middle, means, "o-", color=BLUE, markersize=5, label="mean of positions 1, 2, 3-4, 5-8, 9-16, ...")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.set(xlabel="tokens that the model sees before", ylabel="loss (nats per token)")
    axis.legend()
    return figure


def perplexity(table: pd.DataFrame) -> Figure:
    """Draw the perplexity of each group of texts, and how many tokens are behind it.

    Of many groups, those of the lowest and of the highest perplexity.
    """
    group, left_out = str(table.columns[0]), len(table) - MOST_ROWS
    if left_out > 0:
        table = table.sort_values("perplexity", kind="stable")
        table = pd.concat([table[: MOST_ROWS // 2], table[-(MOST_ROWS // 2) :]])
    names = [_short(str(name)) for name in table[group]]
    rows = np.arange(len(table))
    figure = Figure((WIDTH, 0.9 + 0.27 * len(table)))
    axis = figure.subplots()
    axis.plot(table["perplexity"], rows, "o", color=BLUE, markersize=7)
    axis.set_yticks(rows, names)
    axis.set(ylim=(len(table) - 0.4, -0.6), xlabel="perplexity (lower is better)")
    if left_out > 0:
        axis.axhline(MOST_ROWS / 2 - 0.5, color=GREY, linestyle="--")
        axis.set_title(f"the lowest and the highest; {left_out:,} between them are left out", fontsize="medium")
    beside = axis.secondary_yaxis("right")
    beside.set_yticks(rows, [f"{tokens:,}" for tokens in table["tokens"]])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    axis.annotate("tokens", (1, 1), xytext=(4, 4), xycoords="axes fraction", textcoords="offset points")
    return figure


def calibration(table: pd.DataFrame) -> Figure:
    """Draw `calibration`: accuracy over confidence, and the tokens behind each point."""
    figure = Figure((WIDTH, 4.6))
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], "--", color=GREY, label="as often right as it claims")
    above.plot(table["confidence"], table["accuracy"], "o-", color=BLUE, label="this model")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left")
    below.bar(table["from"], table["tokens"], table["to"] - table["from"], align="edge", color=BLUE, edgecolor=PAPER)
    below.set(xlabel="confidence: the most likely token's probability", ylabel="tokens")
    below.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (above, below):
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    above.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    return figure


def trials(table: pd.DataFrame) -> Figure:
    """Draw `sweep`: the loss of each trial, and the lowest so far."""
    figure = Figure((WIDTH, 3.4))
    axis = figure.subplots()
    complete = _trials(axis, table["trial"], table)
    lowest = complete["val_loss"].cummin()
    axis.step(complete["trial"], lowest, where="post", color=ORANGE, label="lowest so far")
    axis.set(xlabel="trial", ylabel="validation loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def searched(table: pd.DataFrame) -> Figure:
    """Draw `sweep`: the loss over each of its parameters, which are the columns after the third."""
    names = table.columns[3:]
    figure = Figure((WIDTH, 0.5 + 2.2 * len(names)))
    for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        values = table[name]
        if not pd.api.types.is_float_dtype(values) or values.isna().any():  # choices, perhaps null
            values = values.map(str)
        elif values.min() > 0 and values.max() > 4 * values.min():
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        _trials(axis, values, table)
        axis.set(xlabel=name, ylabel="validation loss")
    return figure


# What draws a picture, and from which table.
FIGURES = {
    "loss": (loss, "training"),
    "optimization": (optimization, "training"),
    "loss_by_position": (loss_by_position, "loss_by_position"),
    "perplexity_by_document": (perplexity, "perplexity_by_document"),
    "perplexity_by_decade": (perplexity, "perplexity_by_decade"),
    "perplexity_by_president": (perplexity, "perplexity_by_president"),
    "calibration": (calibration, "calibration"),
    "trials": (trials, "sweep"),  # these two are of no stage: src/sweep.py draws them
    "searched": (searched, "sweep"),
}


def _svg(figure: Figure) -> str:
    with io.StringIO() as file:
        figure.savefig(file, format="svg", metadata=NO_METADATA)
        return re.sub(r"[ \t]+\n", "\n", file.getvalue())


def _curve(axis: Axes, table: pd.DataFrame, name: str, color: str, label: str | None = None) -> None:
    points = table[["tokens", name]].dropna()
    marker = "o" if len(points) <= 50 else None
    axis.plot(points["tokens"], points[name], color=color, marker=marker, markersize=4, label=label)


def _trials(axis: Axes, x: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    """Draw the loss of trials over x; return those that are complete."""
    is_complete = table["state"] == "COMPLETE"
    others = table[~is_complete]
    if len(others):
        axis.plot(x[~is_complete], others["val_loss"], "x", color=GREY, label="pruned or failed, its last")
    axis.plot(x[is_complete], table["val_loss"][is_complete], "o", color=BLUE, label="complete")
    return table[is_complete]


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MOST_CHARACTERS else f"…{name[-MOST_CHARACTERS + 1 :]}"
