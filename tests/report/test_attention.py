"""Attention in pictures and in plain characters: the right weights, at the right tokens, within 80 columns."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2.report.attention import draw_heads, token_labels
from gpt2.report.figures import png
from gpt2.report.terminal import terminal_map, terminal_maps

LABELS = ["The", "cat", "$x_$"]
WEIGHTS = torch.tensor([[1, 0, 0], [0.25, 0.75, 0], [0.054, 0, 0.946]])


def heads_of(*shape: int) -> Tensor:
    """Return causal weights of that shape, no two rows of which are alike."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(*shape, shape[-1], generator=generator)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def test_picture_shows_each_head_once() -> None:
    weights = heads_of(3, 4, 3)
    heads = [(0, 1), (2, 3), (1, 0)]
    figure = draw_heads(weights, LABELS, heads)
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == ["layer 0, head 1", "layer 2, head 3", "layer 1, head 0"]
    assert len(figure.axes) == len(maps) + 1  # the colour bar
    for head, axis in zip(heads, maps, strict=True):
        drawn: Any = axis.images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), np.triu(np.ones((3, 3), dtype=bool), 1))
        np.testing.assert_allclose(drawn.filled(0), weights[head].numpy())
        assert axis.images[0].get_clim() == (0, 1)
    for texts in (maps[0].get_yticklabels(), *(axis.get_xticklabels() for axis in maps)):
        assert [text.get_text() for text in texts] == LABELS and not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(("length", "count"), [(24, 7), (6, 8), (6, 1), (1, 3)])
def test_all_of_a_picture_is_inside_it_and_its_bytes_repeat(length: int, count: int) -> None:
    weights, labels = heads_of(2, 4, length), ["extraordina…"] * length
    heads = [(layer, head) for layer in range(2) for head in range(4)][:count]
    first, second = (draw_heads(weights, labels, heads) for _ in range(2))
    assert png(first) == png(second) != png(draw_heads(1 - weights, labels, heads))
    shown, inside = first.get_tightbbox(), first.bbox_inches
    assert shown.x0 >= 0 and shown.y0 >= 0 and shown.x1 <= inside.x1 and shown.y1 <= inside.y1
    assert inside.width <= 13


def test_terminal_map_is_a_table_of_percentages() -> None:
    assert terminal_map(WEIGHTS, LABELS).splitlines() == [
        "       The   cat  $x_$",
        " The   100",
        " cat    25    75",
        "$x_$     5     0    95",
    ]


def test_larger_terminal_map_has_digits_below_the_tokens() -> None:
    labels = [f"token{i}" for i in range(30)]
    lines = terminal_map(heads_of(30), labels).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 7 + 1 + 30
    heading = [line[9:].ljust(30) for line in lines[1:8]]
    assert ["".join(column).strip() for column in zip(*heading, strict=True)] == labels
    assert [line.split()[0] for line in lines[8:]] == labels


def test_terminal_maps_stand_side_by_side() -> None:
    assert terminal_maps(torch.stack([WEIGHTS, torch.eye(3)]), LABELS, ["one", "two"]).splitlines() == [
        "      one  two",
        " The  9    9",
        " cat  27   .9",
        "$x_$  ..9  ..9",
    ]


def test_terminal_maps_go_on_below_and_say_what_does_not_fit() -> None:
    text = terminal_maps(heads_of(4, 30), LABELS * 10, ["a", "b", "c", "d"])
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) == 2 * 31
    with pytest.raises(ValueError, match="90 tokens do not fit 80 columns"):
        terminal_map(heads_of(90), LABELS * 30)


def test_labels_are_short_and_printable() -> None:
    labels = token_labels(["The", " cat", "\n", "\x1b", " extraordinarily", " 。", "é"])
    assert labels[:4] == ["The", "cat", "'\\n'", "\\x1b"] and "extraordina…" in labels and labels[-1] == "é"
    assert all(label.isprintable() and label for label in labels) and "\\u3002" in labels
