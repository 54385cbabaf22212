"""Generated texts: how they are shown, and metrics of diversity, repetition and copying.

A text is the tokens that were written, without the prompt, which is not the model's. An n-gram is n tokens side by side
in one text, so none begins in a prompt. Shapes: N tokens of a corpus, S places in a piece of it, G n-grams.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gpt2.config import SamplingParams
from gpt2.data.batches import TokenArray, Tokens

Texts = Sequence[Sequence[int]]
Ngram = tuple[int, ...]

CHUNK = 2**18  # tokens of the corpus looked at at once


def describe_settings(row: Mapping[Any, Any]) -> str:
    """Return the settings and the seed of a row of samples.csv in words, without those not set and a penalty of 1."""
    names = [name for name in (*SamplingParams.model_fields, "seed") if name in row]
    numbers = {name: float(row[name]) for name in names if pd.notna(row[name]) and row[name] != ""}
    if numbers.get("repetition_penalty") == 1:
        del numbers["repetition_penalty"]
    return ", ".join(f"{name} {int(one) if one.is_integer() else one}" for name, one in numbers.items())


def quote(row: Mapping[Any, Any]) -> str:
    """Return a row of samples.csv in markdown: its settings, and its text as a quotation, the prompt in bold."""
    text = f"**{row['prompt']}**{row['text']}".replace("\n", "\n> ")
    return f"*{describe_settings(row)}*\n\n> {text}\n"


def measure(texts: Texts, training: Tokens) -> dict[str, float]:
    """Return all metrics of the texts, beside the training split (N,), by their names as metrics; each is in [0, 1]."""
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition": repetition(texts, 4),
        "copied_8grams": copied(texts, training, 8),
    }


def distinct(texts: Texts, n: int) -> float:
    """Return how many different n-grams all the texts have together, for each n-gram; 0 if they have none.

    It is distinct-n of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", who
    divide by the number of tokens instead. It falls as texts grow: compare it at equal lengths.
    """
    grams = _all_ngrams(texts, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Texts, n: int) -> float:
    """Return the fraction of a text's n-grams that stood earlier in it, as the mean over the texts that have n-grams.

    It is seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training". 0 if no text has any.
    """
    fractions = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _ngrams(text, n))]
    return sum(fractions) / len(fractions) if fractions else 0.0


def copied(texts: Texts, corpus: Tokens, n: int, chunk: int = CHUNK) -> float:
    """Return the fraction of all the texts' n-grams that stand in the corpus (N,) verbatim; 0 if they have none.

    The figure is exact. The corpus, which may be a memory map, is read once, `chunk` tokens at a time. The last tokens
    of an n-gram rule out nearly all places at array speed; at the others it is compared itself.
    """
    grams = _all_ngrams(texts, n)
    sought, found = set(grams), set[Ngram]()
    endings = _endings(np.array(list(sought), dtype=np.uint32).reshape(-1, n))
    for start in range(0, len(corpus) - n + 1, chunk):
        places = sliding_window_view(np.asarray(corpus[start : start + chunk + n - 1]), n)  # (S, n)
        likely = places[np.isin(_endings(places), endings)]
        found |= sought.intersection(map(tuple, likely.tolist()))
    return sum(gram in found for gram in grams) / len(grams) if grams else 0.0


def _endings(grams: TokenArray) -> NDArray[np.uint64]:
    """Return the last tokens of n-grams (G, n), at most four, as one number each (G,)."""
    numbers = np.zeros(len(grams), dtype=np.uint64)
    for column in grams.T[-4:]:
        numbers <<= np.uint64(16)  # longer ids overlap, which rules out fewer places
        numbers |= column
    return numbers


def _all_ngrams(texts: Texts, n: int) -> list[Ngram]:
    return [gram for text in texts for gram in _ngrams(text, n)]


def _ngrams(text: Sequence[int], n: int) -> list[Ngram]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
