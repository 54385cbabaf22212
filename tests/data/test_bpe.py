"""A vocabulary that is trained on a corpus: the merges of its most frequent pairs, in tiktoken's format."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.core.files import sha256_of
from gpt2.core.paths import ROOT
from gpt2.data.bpe import train_bpe
from gpt2.data.tokenizer import gpt2_tokenizer, load_tokenizer

TRAIN = """
import sys
from pathlib import Path
from gpt2.data.bpe import train_bpe
words = [f"{a}{b} = λόγος[{a * b}]\\n" for a in range(40) for b in range(40)]
train_bpe(words[:: int(sys.argv[1])], 400, Path(sys.argv[2]))
"""


def test_the_first_tokens_are_gpt2s_and_the_rest_the_most_frequent_pairs(tmp_path: Path) -> None:
    train_bpe(["abab ab abc abc"], 260, tmp_path / "tokenizer.tiktoken")
    tokenizer, gpt2 = load_tokenizer(tmp_path), gpt2_tokenizer().encoding
    tokens = [tokenizer.encoding.decode_single_token_bytes(token) for token in range(tokenizer.vocab_size)]
    assert tokens[:256] == [gpt2.decode_single_token_bytes(token) for token in range(256)]
    assert tokens[256:] == [b"ab", b" ab", b" abc", b"<|endoftext|>"]
    assert tokenizer.end_of_text_id == 259 and tokenizer.encode("abab abc") == [256, 256, 258]


@given(st.text() | st.text("λόγος ἀρχῇ<|endoftext|>\r\n\t日👧"))
def test_any_text_survives_a_round_trip(bpe_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(bpe_file.parent)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.end_of_text_id == 299 for token in tokens)


def test_frequent_words_of_another_language_and_of_code_are_few_tokens(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(bpe_file.parent)
    text = "    return self.λόγος"
    assert len(tokenizer.encode(text)) < len(gpt2_tokenizer().encode(text))
    assert len(tokenizer.encode(" λόγος")) == 1


def test_the_same_texts_give_the_same_bytes_in_any_order_by_any_number_of_threads(tmp_path: Path) -> None:
    found = set()
    for threads, step in (("1", "1"), ("4", "1"), ("4", "-1")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT / "src")}
        file = tmp_path / f"{threads}{step}" / "tokenizer.tiktoken"
        subprocess.run([sys.executable, "-c", TRAIN, step, str(file)], env=environment, check=True)
        found.add(sha256_of(file))
    assert len(found) == 1


def test_more_tokens_than_the_text_gives_are_refused(tmp_path: Path, error_line: Callable[..., str]) -> None:
    line = error_line(lambda: train_bpe(["ab ab"], 300, tmp_path / "tokenizer.tiktoken"))
    assert "prepare.vocab_size 300 is more than the 258 that the train split gives" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["YQ== 0\n", "YQ==\n", "YQ== a\n", "Y 0\n", "é 0\n", "\0", None])
def test_a_broken_file_is_one_line(
    tmp_path: Path, bpe_file: Path, text: str | None, error_line: Callable[..., str]
) -> None:
    whole = bpe_file.read_text()
    (tmp_path / bpe_file.name).write_text(whole.replace(" 7\n", " 8\n") if text is None else text)
    assert "is not a tokenizer" in error_line(lambda: load_tokenizer(tmp_path))


def test_it_goes_to_other_processes(bpe_file: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(bpe_file)))
    assert tokenizer.encode_document("λόγος").tolist() == load_tokenizer(bpe_file).encode_document("λόγος").tolist()


def test_bytes_alone_are_a_vocabulary(tmp_path: Path) -> None:
    train_bpe(["ab ab"], 257, tmp_path / "tokenizer.tiktoken")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_document("aé")[-1] == 256 and len(tokenizer.encode("aé")) == 3
