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
from gpt2.data import tokenizer
from gpt2.data.corpus import SPLITS, Document, digest, split_documents

DTYPE = np.dtype("<u2")
PART_LENGTH = 1 << 20
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def write_token_files(
    documents: Sequence[Document], folder: Path, source: str, val_fraction: float, test_fraction: float
) -> dict[str, Any]:
    """Split and tokenize documents into folder/{train,val,test}.bin, documents.csv and meta.json; return the meta.

    seen_tokens.npy tells of each token of the vocabulary whether the train split has it.
    A document's tokens are followed by one <|endoftext|>. Memory holds one document at a time.
    Raises UserError if a document cannot be read or a split is left without text.
    """
    digests = [digest(document) for document in documents]
    splits = split_documents(documents, digests, val_fraction, test_fraction)
    rows: list[dict[str, Any]] = []
    seen = np.zeros(tokenizer.VOCAB_SIZE, dtype=bool)
    ends_written = 0
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        for document, split, (size, sha256) in zip(documents, splits, digests, strict=True):
            first, count, text = files[split].tell() // DTYPE.itemsize, 0, document.read()
            ends_written += text.count(tokenizer.END_OF_TEXT)
            for tokens in _tokenize(text):
                files[split].write(tokens.tobytes())
                count += len(tokens)
                seen[tokens] |= split == "train"
            del text  # before the next is read
            row = {"document": document.name, "split": split, "first_token": first, "tokens": count}
            rows.append(row | {"bytes": size, "sha256": sha256})
    if ends_written:
        print(
            f"warning: {tokenizer.END_OF_TEXT} stands {ends_written} times in the text, as ordinary characters: "
            "only the end of a file ends a document",
            file=sys.stderr,
        )
    # Names may hold a line end, or bytes that are not UTF-8.
    with (folder / "documents.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        table.writeheader()
        table.writerows(rows)
    meta: dict[str, Any] = {
        "prepare": {"source": source, "val_fraction": val_fraction, "test_fraction": test_fraction},
        "tokenizer": tokenizer.NAME,
        "vocab_size": tokenizer.VOCAB_SIZE,
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


def split_text(text: str) -> Iterator[str]:
    """Cut a long text into parts whose tokens together are those of the whole.

    A cut is between a character and white space after it, which GPT-2's pattern never matches together.
    """
    start = 0
    while start < len(text):
        border = _WORD_END.search(text, start + PART_LENGTH)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def _tokenize(text: str) -> Iterator[NDArray[np.uint16]]:
    for part in split_text(text):  # a list of tokens takes many times the memory of the text
        yield np.array(tokenizer.encode(part), dtype=DTYPE)
    yield np.array([tokenizer.END_OF_TEXT_ID], dtype=DTYPE)
