"""Documents become token files: one flat array of uint16 ids for each split, and tables that tell what is in them."""

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2.core.errors import UserError
from gpt2.core.files import sha256_of, write_json
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.data.bpe import train_bpe
from gpt2.data.corpus import SPLITS, Document, digest, split_documents
from gpt2.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

DTYPE = np.dtype("<u2")
PART_LENGTH = 1 << 20
TRAINING_PART_LENGTH = 1 << 12  # of what a vocabulary is trained on: the library is slow with long texts
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def write_token_files(
    documents: Sequence[Document],
    folder: Path,
    source: str,
    val_fraction: float,
    test_fraction: float,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Split and tokenize documents into folder/{train,val,test}.bin, documents.csv and meta.json; return the meta.

    seen_tokens.npy tells of each token of the vocabulary whether the train split has it.
    With `vocab_size`, the tokenizer is trained on the train split, and written too; else it is GPT-2's.
    A document's tokens are followed by one <|endoftext|>. Memory holds one document at a time.
    Raises UserError if a document cannot be read or a split is left without text.
    """
    digests = [digest(document) for document in documents]
    splits = split_documents(documents, digests, val_fraction, test_fraction)
    rows: list[dict[str, Any]] = []
    if vocab_size:
        training = (document for document, split in zip(documents, splits, strict=True) if split == "train")
        texts = (part for document in training for part in split_text(document.read(), TRAINING_PART_LENGTH))
        train_bpe(texts, vocab_size, folder / TOKENIZER_FILE)
    tokenizer = load_tokenizer(folder)
    seen = np.zeros(tokenizer.vocab_size, dtype=bool)
    ends_written = 0
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        for document, split, (size, sha256) in zip(documents, splits, digests, strict=True):
            first, count, text = files[split].tell() // DTYPE.itemsize, 0, document.read()
            ends_written += text.count(END_OF_TEXT)
            for tokens in _tokenize(text, tokenizer):
                files[split].write(tokens.tobytes())
                count += len(tokens)
                seen[tokens] |= split == "train"
            del text  # before the next is read
            row = {"document": document.name, "split": split, "first_token": first, "tokens": count}
            rows.append(row | {"bytes": size, "sha256": sha256})
    if ends_written:
        print(
            f"warning: {END_OF_TEXT} stands {ends_written} times in the text, as ordinary characters: "
            "only the end of a file ends a document",
            file=sys.stderr,
        )
    # Names may hold a line end, or bytes that are not UTF-8.
    with (folder / "documents.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        table.writeheader()
        table.writerows(rows)
    meta: dict[str, Any] = {
        "prepare": {
            "source": source,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "tokenizer": "bpe" if vocab_size else "gpt2",
            "vocab_size": vocab_size,
        },
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "splits": {split: _totals([row for row in rows if row["split"] == split]) for split in SPLITS},
    }
    for split, totals in meta["splits"].items():
        if not totals["bytes"]:
            raise UserError(
                f"prepare.source {source}: no text is left for the {split} split; add {split}.txt or other files"
            )
        totals["sha256"] = sha256_of(folder / f"{split}.bin")
    np.save(folder / "seen_tokens.npy", seen)
    write_json(folder / "meta.json", meta)
    return meta


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"documents": len(rows), **{name: sum(row[name] for row in rows) for name in ("bytes", "tokens")}}


def split_text(text: str, length: int = PART_LENGTH) -> Iterator[str]:
    """Cut a long text into parts whose tokens together are those of the whole.

    A cut is between a character and white space after it, which GPT-2's pattern never matches together.
    """
    start = 0
    while start < len(text):
        border = _WORD_END.search(text, start + length)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def _tokenize(text: str, tokenizer: Tokenizer) -> Iterator[NDArray[np.uint16]]:
    for part in split_text(text):  # a list of tokens takes many times the memory of the text
        yield np.array(tokenizer.encode(part), dtype=DTYPE)
    yield np.array([tokenizer.end_of_text_id], dtype=DTYPE)
