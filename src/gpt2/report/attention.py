"""Attention weights to look at: a picture of heads, and maps in plain characters for a terminal.

Shapes: L layers, H heads, T positions.
"""

import math
from collections.abc import Sequence
from unicodedata import east_asian_width

from matplotlib.figure import Figure
from torch import Tensor

from gpt2.data import tokenizer

WIDTH = 80  # characters
LABEL_WIDTH = 12  # characters
PICTURE_INCHES = 12.0  # at most, in width
FUTURE = "#e8e8e8"


def token_labels(tokens: Sequence[int]) -> list[str]:
    """Return each token's text as a short label: without spaces around it, and in ASCII what is not one column wide."""
    texts = [tokenizer.decode([token]) for token in tokens]
    shown = ["".join(c if _is_plain(c) else ascii(c)[1:-1] for c in text.strip() or repr(text)) for text in texts]
    return [text if len(text) <= LABEL_WIDTH else f"{text[: LABEL_WIDTH - 1]}…" for text in shown]


def draw_heads(weights: Tensor, labels: Sequence[str], heads: Sequence[tuple[int, int]]) -> Figure:
    """Draw the attention weights (L, H, T, T) of `heads`, each a (layer, head); `labels` (T,) are the tokens' texts.

    Saved as png with metadata={"Software": None}, the same weights give the same bytes.
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


def terminal_map(weights: Tensor, labels: Sequence[str]) -> str:
    """Return one head's weights (T, T) as lines of at most 80 characters: the token of a row looks at those of columns.

    They are percentages if these fit, else digits as in `terminal_maps`. Raises ValueError if T is too large for both.
    """
    stub, cell = max(map(len, labels)), max(3, *map(len, labels)) + 2
    if stub + cell * len(labels) > WIDTH:
        return terminal_maps(weights[None], labels, [""])
    lines = ["".join(f"{label:>{cell}}" for label in labels)]
    lines += ["".join(f"{round(100 * w):{cell}}" for w in row[: i + 1]) for i, row in enumerate(weights.tolist())]
    return _with_stubs(["", *labels], lines)


def terminal_maps(weights: Tensor, labels: Sequence[str], titles: Sequence[str]) -> str:
    """Return the weights (H, T, T) of heads side by side, below their titles, in lines of at most 80 characters.

    A digit tells a weight's tenths (9: from 0.9 to 1), a dot is less. The columns are the same tokens as the rows; a
    single head has their texts above it, too. Raises ValueError if T is too large.
    """
    stub, cell = max(map(len, labels)), max(len(labels), *map(len, titles)) + 2
    fit = (WIDTH - stub) // cell
    if fit < 1:
        raise ValueError(f"the maps of {len(labels)} tokens do not fit {WIDTH} columns")
    digits = [[_digits(row[: i + 1]) for i, row in enumerate(head)] for head in weights.tolist()]
    blocks = []
    for first in range(0, len(titles), fit):
        shown = slice(first, first + fit)
        lines = ["".join(f"  {text:{cell - 2}}" for text in row) for row in zip(*digits[shown], strict=True)]
        heading = ["".join(f"  {title:{cell - 2}}" for title in titles[shown])]
        if len(titles) == 1:  # the columns' tokens, from top to bottom
            heading += [
                f"  {''.join(column)}" for column in zip(*(f"{label:>{stub}}" for label in labels), strict=True)
            ]
        blocks.append(_with_stubs([""] * len(heading) + list(labels), heading + lines))
    return "\n".join(blocks)


def _is_plain(character: str) -> bool:
    return character.isprintable() and east_asian_width(character) not in "WF"


def _digits(row: list[float]) -> str:
    return "".join("." if weight < 0.1 else str(min(9, int(10 * weight))) for weight in row)


def _with_stubs(stubs: Sequence[str], lines: Sequence[str]) -> str:
    width = max(map(len, stubs))
    return "\n".join(f"{stub:>{width}}{line}".rstrip() for stub, line in zip(stubs, lines, strict=True))
