from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data.batches import Shards, load_tokens
from gpt2.evaluation import text_metrics
from gpt2.evaluation.text_metrics import copied, distinct, measure, repetition


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([[1, 2, 1, 2]], 1, 2 / 4),
        ([[1, 2, 1, 2]], 2, 2 / 3),  # 12, 21, 12
        ([[1, 2], [1, 2]], 2, 1 / 2),  # over all texts, and 21 is in none
        ([[1, 2, 3], [1]], 3, 1.0),
        ([[1, 2], [3]], 3, 0.0),
        ([[], []], 1, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct(texts: list[list[int]], n: int, expected: float) -> None:
    assert distinct(texts, n) == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([[1, 2, 3, 4, 5]], 0.0),
        ([[7] * 13], 1 - 1 / 10),
        ([[7] * 13, [1, 2, 3, 4]], (1 - 1 / 10) / 2),
        ([[7] * 13, [1, 2, 3], []], 1 - 1 / 10),  # a text too short to repeat does not count
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # what another text said before is no repetition
        ([[1, 2, 3], []], 0.0),
    ],
)
def test_repetition(texts: list[list[int]], expected: float) -> None:
    assert repetition(texts, 4) == pytest.approx(expected)


def test_copied() -> None:
    corpus = np.array([5, 1, 2, 3, 4], dtype=np.uint16)
    assert copied([[1, 2, 3], [2, 3], [3, 2]], corpus, 2) == 3 / 4
    assert copied([[4, 5], [3, 4, 5]], corpus, 2) == 1 / 3  # the corpus is no ring
    assert copied([[1, 2, 3, 9]], corpus, 3) == 1 / 2
    assert copied([[1, 2, 3, 9], [2, 3, 9]], corpus, 3) == 1 / 3  # each time that it is written
    assert copied([[1]], corpus, 2) == 0
    assert copied([[1, 2, 3]], corpus[:2], 3) == 0
    assert copied([[1, 2, 3], [2, 3], [3, 2]], Shards([corpus[:2], corpus[2:]]), 2) == 3 / 4


def test_copied_tells_ids_beyond_16_bits_apart() -> None:
    corpus = np.array([1, 2, 2**16 + 3, 4], dtype=np.uint32)
    assert copied([[1, 2, 2**16 + 3], [1, 2, 3], [1, 3, 3]], corpus, 3) == 1 / 3


small_texts = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4)


@given(small_texts, st.lists(st.integers(0, 2), max_size=40), st.integers(1, 10), st.integers(1, 9))
def test_copied_equals_a_search_by_hand(texts: list[list[int]], corpus: list[int], n: int, chunk: int) -> None:
    places = [corpus[i : i + n] for i in range(len(corpus) - n + 1)]
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    expected = sum(gram in places for gram in grams) / len(grams) if grams else 0.0
    assert copied(texts, np.array(corpus, dtype=np.uint16), n, chunk) == expected


def test_measure_reads_a_token_file(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 2 * text_metrics.CHUNK).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    border = text_metrics.CHUNK - 4
    across_chunks, at_end, own = ids[border : border + 9].tolist(), ids[-8:].tolist(), list(range(9))
    assert measure([across_chunks, at_end, own], load_tokens(tmp_path / "train.bin")) == {
        "distinct_1": pytest.approx(1.0, abs=0.1),
        "distinct_2": 1.0,
        "distinct_3": 1.0,
        "repetition": 0.0,
        "copied_8grams": 3 / 5,
    }


def test_no_text_has_figures_all_the_same() -> None:
    figures = measure([[], []], np.array([1, 2, 3], dtype=np.uint16))
    assert set(figures.values()) == {0.0} and all(type(value) is float for value in figures.values())
