"""Attention weights to look at: a picture of heads, with the tokens' texts on both axes.

Shapes: L layers, H heads, T positions.
"""

import math
from collections.abc import Sequence
from unicodedata import east_asian_width

from matplotlib.figure import Figure
from torch import Tensor

LABEL_WIDTH = 12  # characters
PICTURE_INCHES = 12.0  # at most, in width
FUTURE = "#e8e8e8"


def token_labels(texts: Sequence[str]) -> list[str]:
    """Return the texts of tokens as short labels: no spaces around, and in ASCII what is not one column wide."""
    shown = ["".join(c if is_one_column(c) else ascii(c)[1:-1] for c in text.strip() or repr(text)) for text in texts]
    return [text if len(text) <= LABEL_WIDTH else f"{text[: LABEL_WIDTH - 1]}…" for text in shown]


def draw_heads(weights: Tensor, labels: Sequence[str], heads: Sequence[tuple[int, int]]) -> Figure:
    """Draw the attention weights (L, H, T, T) of `heads`, each a (layer, head); `labels` (T,) are the tokens' texts.

    Drawn within figures.same_style and saved by its png, the same weights give the same bytes.
    """
    length = len(labels)
    side = max(2.4 if len(heads) <= 6 else 1.6, 0.17 * length)  # inches of a map
    margin = 0.6 + 0.065 * max(map(len, labels))  # inches of the tokens' texts
    rows = math.ceil(len(heads) / max(1, int((PICTURE_INCHES - margin) / (side + 0.1))))
    columns = math.ceil(len(heads) / rows)
    size = (margin + columns * (side + 0.1) + 0.8, margin + rows * (side + 0.3) + 0.2)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="compressed")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    future = weights.new_ones(length, length).triu(1).bool()
    for (layer, head), axis in zip(heads, axes.flat, strict=False):
        seen = weights[layer, head].masked_fill(future, math.nan)
        image = axis.imshow(seen.float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"layer {layer}, head {head}", fontsize=9)
    for i, axis in enumerate(axes.flat):
        axis.set_facecolor(FUTURE)
        axis.set_xticks(range(length), labels, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(length), labels, fontsize=8, parse_math=False)
        axis.tick_params(length=0, labelbottom=i + columns >= len(heads))  # below the last map of each column
        axis.set_visible(i < len(heads))
    figure.supylabel("a token", fontsize=10)
    figure.supxlabel("the tokens that it looks at", fontsize=10)
    bar = figure.colorbar(image, ax=axes, aspect=30, shrink=min(1, 3 / (rows * side)))
    bar.set_label("weight (a row sums to 1); grey: later tokens", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def is_one_column(character: str) -> bool:
    """Tell whether a character can be shown, and takes one column."""
    return character.isprintable() and east_asian_width(character) not in "WF"
