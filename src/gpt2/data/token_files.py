"""Documents become token files: one flat array of ids for each split, and tables that tell what is in them."""

import csv
import hashlib
import re
import sys
import tempfile
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from joblib import cpu_count
from numpy.typing import NDArray

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.core.files import sha256_of, write_json
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.core.progress import Progress
from gpt2.data.bpe import train_bpe
from gpt2.data.corpus import Text
from gpt2.data.splits import SPLITS, Document, split_documents
from gpt2.data.tokenizer import END_OF_TEXT, LONGEST_RUN, TokenArray, Tokenizer, load_tokenizer

SHARD_TOKENS = 1 << 28  # of one file; the split goes on in the next
PART_LENGTH = 1 << 20
TRAINING_PART_LENGTH = 1 << 12  # of what a vocabulary is trained on: the library is slow with long texts
COLUMNS = ("document", "split", "first_token", "tokens", "bytes", "sha256")
Item = TypeVar("Item")
Result = TypeVar("Result")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def write_token_files(
    texts: Iterable[Text], folder: Path, params: PrepareParams
) -> tuple[dict[str, Any], Counter[str]]:
    """Split and tokenize texts into folder/{train,val,test}.bin, documents.csv and meta.json.

    A split of more than SHARD_TOKENS goes on in train.1.bin, train.2.bin and so on.
    Returns the meta, and a count of the documents that are left out, by kind.
    seen_tokens.npy tells of each token of the vocabulary whether the train split has it.
    With params.vocab_size, the tokenizer is trained on the train split, and written too; else it is GPT-2's.
    A document's tokens are followed by one <|endoftext|>. The texts are read once, and memory holds one at a time: a
    nameless file keeps them until they are split. Raises UserError if one cannot be read or a split has no text.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        documents, too_short = _store(texts, file, params)
        duplicates = len(documents) - len({document.sha256 for document in documents})
        documents, left_out = split_documents(documents, file, params)
        left_out["shorter than prepare.min_chars"] = too_short
        if params.vocab_size:
            training = (one.read(file.fileno()).decode() for one in documents if one.split == "train")
            parts = (part for text in training for part in split_text(text, TRAINING_PART_LENGTH))
            train_bpe(parts, params.vocab_size, folder / TOKENIZER_FILE)
        tokenizer = load_tokenizer(folder)
        splits = _write(documents, file, folder, tokenizer)
    meta: dict[str, Any] = {
        "prepare": params.model_dump(),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.str,
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
    file.flush()  # it is read by its descriptor
    return documents, too_short


def _write(documents: Sequence[Document], file: BinaryIO, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the token files and tables; return the totals of each split."""
    totals = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    seen = np.zeros(tokenizer.vocab_size, dtype=bool)
    ends_written = 0
    with ExitStack() as stack:
        # Names may hold a line end, or bytes that are not UTF-8.
        table = (folder / "documents.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="")
        rows = csv.writer(stack.enter_context(table), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        rows.writerow(COLUMNS)
        size = sum(document.size for document in documents)
        progress = stack.enter_context(Progress("bytes tokenized", size, brief=True))
        tokenize = partial(_tokenize, descriptor=file.fileno(), tokenizer=tokenizer, own=threading.local())
        for batch, (tokens, counts, ends) in _in_threads(tokenize, _batches(documents)):
            for split, ids in tokens.items():
                _append(folder, split, ids, totals[split]["tokens"])
                hashes[split].update(ids.data)
                if split == "train":
                    seen[ids] = True
            for document, count in zip(batch, counts.tolist(), strict=True):
                total = totals[str(document.split)]
                rows.writerow(
                    [document.name, document.split, total["tokens"], count, document.size, document.sha256.hex()]
                )
                total["documents"] += 1
                total["bytes"] += document.size
                total["tokens"] += count
            progress.advance(sum(document.size for document in batch))
            ends_written += ends
    if ends_written:
        print(
            f"warning: {END_OF_TEXT} stands {ends_written} times in the text, as ordinary characters: "
            f"set prepare.separator to {END_OF_TEXT!r} if it ends documents",
            file=sys.stderr,
        )
    np.save(folder / "seen_tokens.npy", seen)
    return {
        split: total | {"sha256": hashes[split].hexdigest(), "files": _index(folder, split, total["tokens"])}
        for split, total in totals.items()
    }


def _append(folder: Path, split: str, ids: TokenArray, written: int) -> None:
    """Write ids to the files of a split, which hold `written` tokens so far."""
    while len(ids):
        number, place = divmod(written, SHARD_TOKENS)
        part, ids = np.split(ids, [SHARD_TOKENS - place])
        with (folder / _file_name(split, number)).open("ab" if place else "wb") as file:
            file.write(part.data)
        written += len(part)


def _index(folder: Path, split: str, tokens: int) -> dict[str, dict[str, Any]]:
    """Return of each file of a split, in order, its tokens and SHA-256."""
    index = {}
    for number, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        name = _file_name(split, number)
        index[name] = {"tokens": min(SHARD_TOKENS, tokens - start), "sha256": sha256_of(folder / name)}
    return index


def _file_name(split: str, number: int) -> str:
    return f"{split}.{number}.bin" if number else f"{split}.bin"


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


def _tokenize(
    documents: Sequence[Document], descriptor: int, tokenizer: Tokenizer, own: threading.local
) -> tuple[dict[str, TokenArray], NDArray[np.intp], int]:
    """Return the tokens of each split, of each document their count, and how often <|endoftext|> is written out."""
    if not hasattr(own, "tokenizer"):  # a regular expression takes a quarter longer in a thread that shares it
        own.tokenizer = Tokenizer(tokenizer.name, tokenizer.ranks)
    texts = [document.read(descriptor).decode("utf-8") for document in documents]
    ids = encode_documents(own.tokenizer, texts)
    counts = np.diff(np.flatnonzero(ids == tokenizer.end_of_text_id), prepend=-1)
    split_of = np.repeat(np.array([SPLITS.index(str(document.split)) for document in documents], np.int8), counts)
    tokens = {split: ids[split_of == number] for number, split in enumerate(SPLITS)}
    return tokens, counts, sum(text.count(END_OF_TEXT) for text in texts)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenArray:
    """Return the tokens (N,) of texts, each followed by <|endoftext|>."""
    if all(len(text) < LONGEST_RUN and END_OF_TEXT not in text for text in texts):  # one call is faster than many
        joined = END_OF_TEXT.join([*texts, ""])
        return tokenizer.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype(tokenizer.dtype)
    arrays = []
    for text in texts:
        for part in split_text(text):
            arrays += tokenizer.encode_arrays(part)
        arrays.append(np.array([tokenizer.end_of_text_id], dtype=np.uint32))
    return np.concatenate(arrays, dtype=tokenizer.dtype)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents, in order, that together are large enough for a thread."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= PART_LENGTH:
            yield batch
            batch, size = [], 0
    yield batch


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item and its result, in order, a few ahead of what is taken: tiktoken runs without Python's lock."""
    threads, waiting = cpu_count(), deque[tuple[Item, Future[Result]]]()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
