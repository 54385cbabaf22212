"""What a terminal of 80 columns shows of a model: its modules, texts side by side, attention weights in characters.

Shapes: B batch, H heads, T positions.
"""

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.generation.repl import ESCAPES
from gpt2.model.gpt2 import GPT2Model
from gpt2.report.attention import is_one_column

WIDTH, COLUMN = 80, 25  # characters


@torch.no_grad()
def output_shapes(model: GPT2Model, tokens: Tensor) -> dict[nn.Module, str]:
    """Return the shape of what each module gives in a forward pass of token ids (B, T)."""
    shapes: dict[nn.Module, str] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        shapes[module] = str(tuple(output.shape))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return shapes


def print_modules(module: nn.Module, shapes: dict[nn.Module, str], name: str = "model", depth: int = 0) -> None:
    """Print a line for a module and each one in it; of a list of equal ones, those in the first alone."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    left = f"{'  ' * depth}{name}: {type(module).__name__}"
    print(f"{left:44}{shapes.get(module, ''):16}{parameters:>12,}")
    for i, (child_name, child) in enumerate(module.named_children()):
        if not isinstance(module, nn.ModuleList) or i == 0:
            print_modules(child, shapes, child_name, depth + 1)
        elif i == 1:
            print(f"{'  ' * (depth + 1)}... and {len(module) - 1} more of the same shape")


def print_columns(texts: Sequence[str]) -> None:
    """Print texts side by side, without the characters that a terminal would obey or that are not one column wide."""
    wrapped = [textwrap.wrap("".join(map(_one_column, text.strip().translate(ESCAPES))), COLUMN) for text in texts]
    for row in zip_longest(*wrapped, fillvalue=""):
        print("  ".join(f"{line:{COLUMN}}" for line in row).rstrip())


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


def _one_column(character: str) -> str:
    return character if character in "\n\t" or is_one_column(character) else "\ufffd"


def _digits(row: list[float]) -> str:
    return "".join("." if weight < 0.1 else str(min(9, int(10 * weight))) for weight in row)


def _with_stubs(stubs: Sequence[str], lines: Sequence[str]) -> str:
    width = max(map(len, stubs))
    return "\n".join(f"{stub:>{width}}{line}".rstrip() for stub, line in zip(stubs, lines, strict=True))
