"""The numbers behind the report's pictures: what a model predicts of a split, token by token, and means of it.

Shapes: N tokens of a split.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from gpt2.data.batches import Tokens
from gpt2.evaluation.perplexity import check_finite, predictions, sliding_windows
from gpt2.model.gpt2 import GPT2Model

BINS = 10  # of the confidence, of equal width
CURVES = ("train_loss", "val_loss", "train_learning_rate", "train_grad_norm")


class Predictions(NamedTuple):
    """Of each token (N,): its loss in nats, the probability of the most likely token, and whether that was it."""

    losses: NDArray[np.float64]
    confidences: NDArray[np.float64]
    hits: NDArray[np.float64]


def predict(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int, name: str = "predict") -> Predictions:
    """Predict all tokens (N,) by `predictions`. Raises UserError if a loss is not finite."""
    found = []
    for logits, targets in predictions(model, tokens, stride, batch_size, name):
        total = logits.logsumexp(-1)
        highest, most_likely = logits.max(-1)
        losses = total - logits.gather(-1, targets[:, None]).squeeze(-1)
        found.append(torch.stack([losses, (highest - total).exp(), most_likely == targets]).cpu())
    losses, confidences, hits = torch.cat(found, 1).double().numpy()
    check_finite(losses.mean())
    return Predictions(losses, confidences, hits)


def training(plots: Path, batch_tokens: int) -> pd.DataFrame:
    """Return the curves of a training, a row a step that has a value: step, tokens trained on, then CURVES.

    Raises OSError or ValueError if a curve cannot be read.
    """
    curves = [pd.read_csv(plots / f"{name}.csv", index_col="step").set_axis([name], axis=1) for name in CURVES]
    table = pd.concat(curves, axis=1).sort_index().reset_index()
    table.insert(1, "tokens", table["step"] * batch_tokens)
    return table


def by_position(losses: NDArray[np.float64], max_len: int) -> pd.DataFrame:
    """Return the mean loss at each position, from losses (N,) that were predicted in windows side by side.

    The position is the number of tokens that the model sees before the one that it predicts: 1 to max_len.
    """
    windows = sliding_windows(len(losses), max_len, max_len)
    positions = np.concatenate([np.arange(scored, end) - start + 1 for start, end, scored in windows])
    groups = pd.DataFrame({"position": positions, "loss": losses}).groupby("position")["loss"]
    return groups.agg(tokens="size", loss="mean").reset_index()


def by_document(documents: pd.DataFrame, losses: NDArray[np.float64]) -> pd.DataFrame:
    """Return tokens, loss and perplexity of each document of a split, from its rows of documents.csv in order."""
    return _means(documents["document"], documents["tokens"], np.add.reduceat(losses, documents["first_token"]))


def sotu_groups(documents: pd.DataFrame) -> pd.DataFrame:
    """Return the decade and the presidency of each document of the default corpus, e.g. 1840s and Tyler 1841-1844.

    Documents are named NUMBER YEAR PRESIDENT, sections of them also [START:END], and stand in order. A presidency is an
    unbroken row of one name, so that both Roosevelts have their own. Raises ValueError for other names.
    """
    parts = [re.fullmatch(r"\d+ (\d{4}) (.+?)(?:\[\d+:\d+\])?", name) for name in documents["document"]]
    if None in parts:
        raise ValueError(f"{documents['document'][parts.index(None)]!r} is no name of the default corpus")
    table = pd.DataFrame([part.groups() for part in parts if part], columns=["year", "president"])
    row = (table["president"] != table["president"].shift()).cumsum()
    years = table.groupby(row)["year"]
    first, last = years.transform("first"), years.transform("last")
    terms = first + ("-" + last).where(first != last, "")
    return pd.DataFrame({"decade": table["year"].str[:3] + "0s", "president": table["president"] + " " + terms})


def grouped(table: pd.DataFrame, groups: pd.Series) -> pd.DataFrame:
    """Return the rows of `by_document` put together by their group, in the groups' order."""
    sums = pd.DataFrame({"tokens": table["tokens"], "loss": table["loss"] * table["tokens"]})
    totals = sums.groupby(groups.to_numpy(), sort=False).sum()
    return _means(totals.index.to_series(name=groups.name), totals["tokens"], totals["loss"].to_numpy())


def calibration(predicted: Predictions) -> pd.DataFrame:
    """Return for each bin of confidence that has tokens: its bounds, tokens, mean confidence, and accuracy."""
    bins = np.minimum((predicted.confidences * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"bin": bins, "confidence": predicted.confidences, "accuracy": predicted.hits}).groupby("bin")
    means = table[["confidence", "accuracy"]].mean()
    means.insert(0, "from", means.index / BINS)
    means.insert(1, "to", (means.index + 1) / BINS)
    means.insert(2, "tokens", table.size())
    return means.reset_index(drop=True)


def _means(names: pd.Series, tokens: pd.Series, sums: NDArray[np.float64]) -> pd.DataFrame:
    loss = sums / tokens.to_numpy()
    with np.errstate(over="ignore"):  # infinite where a float cannot hold it
        perplexity = np.exp(loss)
    columns = {names.name: names.to_numpy(), "tokens": tokens.to_numpy(), "loss": loss, "perplexity": perplexity}
    return pd.DataFrame(columns)
