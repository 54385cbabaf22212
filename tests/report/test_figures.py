"""Equal numbers give equal pictures, whatever the names in them and the settings of the user's matplotlib are."""

import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from gpt2.report.attention import draw_heads
from gpt2.report.figures import FIGURES, INK, MOST_ROWS, PAPER, draw_all, for_page, perplexity, png, same_style


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    names = ["$\\unknown$", "<b>&amp;--", "a" * 99, "日本\n語"]
    texts = pd.DataFrame({"document": names, "tokens": 5, "perplexity": [2.0, 3, np.inf, 4]})
    return {
        "training": pd.DataFrame(
            {
                "tokens": [0, 10, 20],
                "train_loss": [np.nan, 3, 2],
                "val_loss": [4, np.nan, 3],
                "train_learning_rate": [np.nan, 1e-3, 1e-4],
                "train_grad_norm": [np.nan, 1, 0.5],
            }
        ),
        "loss_by_position": pd.DataFrame({"position": [1, 2, 3], "tokens": [2, 2, 1], "loss": [3.0, 2, 1]}),
        "perplexity_by_document": texts,
        "perplexity_by_decade": texts.rename(columns={"document": "decade"}),
        "perplexity_by_president": texts.rename(columns={"document": "president"}),
        "calibration": pd.DataFrame(
            {"from": [0.0, 0.9], "to": [0.1, 1.0], "tokens": [3, 1], "confidence": [0.05, 0.95], "accuracy": [0, 1]}
        ),
        "sweep": pd.DataFrame(
            {
                "trial": [0, 1, 2],
                "state": ["COMPLETE", "PRUNED", "COMPLETE"],
                "val_loss": [3.0, 4, 2],
                "train.learning_rate": [1e-4, 1e-3, 1e-2],
                "train.weight_decay": [0.0, 0.1, 0.1],
                "train.optimizer": ["adamw", "muon", "muon"],
            }
        ),
    }


@pytest.mark.filterwarnings("error")
def test_equal_tables_give_equal_pictures(tables: dict[str, pd.DataFrame]) -> None:
    pictures = draw_all(tables)
    assert set(pictures) == set(FIGURES)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": None, "text.usetex": True}):
        assert draw_all(tables) == pictures
    assert set(draw_all({"training": tables["training"]})) == {"loss", "optimization"}
    for picture in pictures.values():
        ET.fromstring(picture)
        assert "Matplotlib" not in picture and "<dc:date>" not in picture
        inlined = for_page(picture)
        assert ET.fromstring(inlined).tag.endswith("svg")
        assert "currentColor" in inlined and INK not in inlined and PAPER not in inlined


def test_a_picture_of_heads_is_the_same_whatever_a_matplotlibrc_says() -> None:
    def drawn() -> bytes:
        with same_style():
            return png(draw_heads(torch.tensor([[[[1.0, 0], [0.5, 0.5]]]]), ["a", "\U0010ffff"], [(0, 0)]))

    expected = drawn()
    with matplotlib.rc_context({"savefig.dpi": 300, "font.family": "serif", "text.usetex": True}):
        assert drawn() == expected


def test_png_tells_neither_time_nor_version() -> None:
    figure = Figure((1, 1))
    assert png(figure) == png(figure)
    assert b"matplotlib" not in png(figure).lower() and b"tEXt" not in png(figure)


def test_of_many_documents_the_extremes_are_drawn() -> None:
    table = pd.DataFrame({"document": [f"{i:03}" for i in range(100)], "tokens": 1, "perplexity": np.arange(100.0)})
    axis: Any = perplexity(table).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(names) == MOST_ROWS and names[0] == "000" and names[-1] == "099"
    assert "70 between them" in axis.get_title()
