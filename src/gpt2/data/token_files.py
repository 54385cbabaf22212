"""Documents become token files: one flat array of uint16 ids for each split, and tables that tell what is in them."""

import csv
import hashlib
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.core.files import sha256_of, write_json
from gpt2.data import tokenizer
from gpt2.data.corpus import Text
from gpt2.data.splits import SPLITS, Document, split_documents

DTYPE = np.dtype("<u2")
PART_LENGTH = 1 << 20
COLUMNS = ("document", "split", "first_token", "tokens", "bytes", "sha256")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def write_token_files(
    texts: Iterable[Text], folder: Path, params: PrepareParams
) -> tuple[dict[str, Any], Counter[str]]:
    """Split and tokenize texts into folder/{train,val,test}.bin, documents.csv and meta.json.

    Returns the meta, and a count of the documents that are left out, by kind.
    seen_tokens.npy tells of each token of the vocabulary whether the train split has it.
    A document's tokens are followed by one <|endoftext|>. The texts are read once, and memory holds one at a time: a
    nameless file keeps them until they are split. Raises UserError if one cannot be read or a split has no text.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        documents, too_short = _store(texts, file, params)
        duplicates = len(documents) - len({document.sha256 for document in documents})
        documents, left_out = split_documents(documents, file, params)
        left_out["shorter than prepare.min_chars"] = too_short
        splits = _write(documents, file, folder)
    meta: dict[str, Any] = {
        "prepare": params.model_dump(),
        "tokenizer": tokenizer.NAME,
        "vocab_size": tokenizer.VOCAB_SIZE,
        "duplicates": duplicates,
        "left_out": {kind: count for kind, count in sorted(left_out.items()) if count},
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)
    return meta, left_out


def _store(texts: Iterable[Text], file: BinaryIO, params: PrepareParams) -> tuple[list[Document], int]:
    """Write the texts to the file, one after the other, but for those that are too short; also return their number."""
    documents, too_short, start = [], 0, 0
    for name, text, split in texts:
        if params.unicode:
            text = unicodedata.normalize(params.unicode, text)
        if len(text) < params.min_chars:
            too_short += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{name} of prepare.source {params.source} is not text: {error.reason}") from None
        file.write(data)
        documents.append(Document(name, start, len(data), hashlib.sha256(data).digest(), split))
        start += len(data)
    return documents, too_short


def _write(documents: Iterable[Document], file: BinaryIO, folder: Path) -> dict[str, Any]:
    """Write the token files and tables; return the totals of each split."""
    totals = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    seen = np.zeros(tokenizer.VOCAB_SIZE, dtype=bool)
    ends_written = 0
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        # Names may hold a line end, or bytes that are not UTF-8.
        table = (folder / "documents.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="")
        rows = csv.writer(stack.enter_context(table), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        rows.writerow(COLUMNS)
        for document in documents:
            split = document.split or "train"
            total, text, count = totals[split], document.read(file).decode("utf-8"), 0
            ends_written += text.count(tokenizer.END_OF_TEXT)
            for tokens in _tokenize(text):
                files[split].write(tokens.tobytes())
                count += len(tokens)
                seen[tokens] |= split == "train"
            del text  # before the next is read
            rows.writerow([document.name, split, total["tokens"], count, document.size, document.sha256.hex()])
            for name, value in (("documents", 1), ("bytes", document.size), ("tokens", count)):
                total[name] += value
    if ends_written:
        print(
            f"warning: {tokenizer.END_OF_TEXT} stands {ends_written} times in the text, as ordinary characters: "
            f"set prepare.separator to {tokenizer.END_OF_TEXT!r} if it ends documents",
            file=sys.stderr,
        )
    np.save(folder / "seen_tokens.npy", seen)
    return {split: total | {"sha256": sha256_of(folder / f"{split}.bin")} for split, total in totals.items()}


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
