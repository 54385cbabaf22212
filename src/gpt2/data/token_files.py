"""Documents become token files: one flat array of uint16 ids for each split, and tables that tell what is in them."""

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.core.errors import UserError
from gpt2.core.files import write_json
from gpt2.data import tokenizer
from gpt2.data.corpus import SPLITS, Document, digest, split_documents

DTYPE = np.dtype("<u2")


def write_token_files(
    documents: Sequence[Document], folder: Path, source: str, val_fraction: float, test_fraction: float
) -> dict[str, Any]:
    """Split and tokenize documents into folder/{train,val,test}.bin, documents.csv and meta.json; return the meta.

    seen_tokens.npy tells of each token of the vocabulary whether the train split has it.

    A document's tokens are followed by one <|endoftext|>. Memory is bounded by a piece of text, not by a document.
    Raises UserError if a document cannot be read or a split is left without text.
    """
    digests = [digest(document) for document in documents]
    splits = split_documents(digests, val_fraction, test_fraction)
    hashers = {split: hashlib.sha256() for split in SPLITS}
    seen = np.zeros(tokenizer.VOCAB_SIZE, dtype=bool)  # by the train split
    totals = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        table = stack.enter_context((folder / "documents.csv").open("w", encoding="utf-8", newline=""))
        rows = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # names may hold a \r
        rows.writerow(["document", "split", "first_token", "tokens", "bytes", "sha256"])
        for document, split, found in zip(documents, splits, digests, strict=True):
            total, count = totals[split], 0
            for ids in _tokenize(document):
                data = np.array(ids, dtype=DTYPE).tobytes()
                files[split].write(data)
                hashers[split].update(data)
                count += len(ids)
                if split == "train":
                    seen[ids] = True
            rows.writerow([document.name, split, total["tokens"], count, found.bytes, found.sha256])
            total["documents"] += 1
            total["bytes"] += found.bytes
            total["tokens"] += count
    for split, total in totals.items():
        if not total["bytes"]:
            raise UserError(f"prepare.source {source}: no text is left for the {split} split")
    meta = {
        "source": source,
        "tokenizer": tokenizer.NAME,
        "vocab_size": tokenizer.VOCAB_SIZE,
        "splits": {split: {**totals[split], "sha256": hashers[split].hexdigest()} for split in SPLITS},
    }
    np.save(folder / "seen_tokens.npy", seen)
    write_json(folder / "meta.json", meta)
    return meta


def cut_at_spaces(pieces: Iterable[str]) -> Iterator[str]:
    """Cut a stream of text anew, so that encoding the parts gives the tokens of the whole.

    GPT-2's pattern never matches across the border from a character to white space after it, so that is where
    cuts are safe. Only a run of more than LONGEST_RUN characters without any such border, e.g. base64, is cut inside.
    """
    kept = ""
    for piece in pieces:
        kept += piece
        cut = next((i for i in range(len(kept) - 1, 0, -1) if kept[i].isspace() and not kept[i - 1].isspace()), 0)
        if cut:
            yield kept[:cut]
            kept = kept[cut:]
        while len(kept) > tokenizer.LONGEST_RUN:
            yield kept[: tokenizer.LONGEST_RUN]
            kept = kept[tokenizer.LONGEST_RUN :]
    if kept:
        yield kept


def _tokenize(document: Document) -> Iterator[list[int]]:
    for part in cut_at_spaces(document.pieces()):
        yield tokenizer.encode(part)
    yield [tokenizer.END_OF_TEXT_ID]
