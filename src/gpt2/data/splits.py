"""Documents are split into train, val and test: the splits that the corpus gives, and fractions for those it lacks."""

import hashlib
import itertools
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import BinaryIO

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError

SPLITS = ("train", "val", "test")
SECTIONS = 5  # of the smallest split, that a document larger than it is cut into
MOST_OVER = 3  # a split of more text than train may get this many times its fraction, since rows stay whole
SECTION = r"\[\d+:\d+\]$"  # what the name of a document's section has behind the document's
LONGEST_LINE = 1 << 20  # bytes; a longer line may be cut inside


@dataclass(slots=True)
class Document:
    """A text in the file that holds all of them in UTF-8."""

    name: str
    start: int  # in bytes
    size: int
    sha256: bytes
    split: str | None = None  # the one that the corpus gives, until all are split

    def read(self, descriptor: int) -> bytes:
        """Return the document's bytes, from a file that other threads read too."""
        return os.pread(descriptor, self.size, self.start)


def split_documents(
    documents: list[Document], file: BinaryIO, params: PrepareParams
) -> tuple[list[Document], Counter[str]]:
    """Return the documents with their splits, in order, and a count of what is left out, by kind.

    Splits that no document is given for take their fractions of the bytes: of the documents without a split, else of
    those given for train. Such documents are cut at line ends if they are larger than the smallest of these splits.
    Equal documents are never in two splits. Raises UserError if a split is left without text, or would get far more
    than its fraction, and more than train.
    """
    documents, left_out = _keep_equal_together(documents, params.deduplicate)
    fractions = {"test": params.test_fraction, "val": params.val_fraction}
    missing = {name: fraction for name, fraction in fractions.items() if all(one.split != name for one in documents)}
    drawn_from = None if any(one.split is None for one in documents) else "train"
    if missing:
        piece = min(missing.values()) * sum(one.size for one in documents if one.split == drawn_from)
        parts = (_cut(one, file, piece) if one.split == drawn_from else (one,) for one in documents)
        documents = list(itertools.chain.from_iterable(parts))
        documents, equal = _keep_equal_together(documents, params.deduplicate)  # sections too
        left_out += equal
    sizes = Counter[bytes]()
    for one in documents:
        if one.split == drawn_from:
            sizes[one.sha256] += one.size
    drawn = _draw(sizes, missing, leave_one=drawn_from == "train" or all(one.split != "train" for one in documents))
    for one in documents:
        if one.split == drawn_from:
            one.split = drawn.get(one.sha256, "train")
    _check(documents, {name: fraction * sizes.total() for name, fraction in missing.items()}, params)
    return documents, left_out


def _draw(sizes: Counter[bytes], fractions: dict[str, float], leave_one: bool) -> dict[bytes, str]:
    """Return the splits of texts, by hash, that make these fractions of all bytes, and have at least a text each.

    The order of the hashes stands in for a shuffle: it is the same for the same texts, whatever their names or order.
    Texts larger than a split should be are taken last, the largest at the very last.
    """
    total = sizes.total()
    most = max(fractions.values(), default=0) * total
    ordered = sorted(sizes)
    large = sorted((one for one in ordered if sizes[one] > most), key=sizes.__getitem__, reverse=True)
    left = large + [one for one in ordered if sizes[one] <= most]  # taken from the end
    drawn: dict[bytes, str] = {}
    for later, (name, fraction) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
        taken = 0
        while taken < fraction * total and len(left) > later + leave_one:
            sha256 = left.pop()
            taken += sizes[sha256]
            drawn[sha256] = name
    return drawn


def _cut(document: Document, file: BinaryIO, most: float) -> list[Document]:
    """Cut a document larger than `most` bytes at line ends into sections of about a fifth of that."""
    if document.size <= most:
        return [document]
    sections = min(round(SECTIONS * document.size / most), document.size)
    bounds = {0, document.size}
    for number in range(1, sections):
        file.seek(document.start + document.size * number // sections)
        file.readline(LONGEST_LINE)
        while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:  # inside a UTF-8 character
            pass
        bounds.add(min(file.tell() - len(byte) - document.start, document.size))
    if len(bounds) == 2:
        return [document]
    parts = []
    for start, end in itertools.pairwise(sorted(bounds)):
        part = replace(document, name=f"{document.name}[{start}:{end}]", start=document.start + start, size=end - start)
        parts.append(replace(part, sha256=hashlib.sha256(part.read(file.fileno())).digest()))
    return parts


def _keep_equal_together(documents: list[Document], deduplicate: bool) -> tuple[list[Document], Counter[str]]:
    """Give equal documents one split. Of copies in given splits, those in test are kept, else those in val."""
    home: dict[bytes, str] = {}
    for one in documents:
        if one.split and SPLITS.index(one.split) >= SPLITS.index(home.get(one.sha256, "train")):
            home[one.sha256] = one.split
    kept, seen, left_out = [], set[bytes](), Counter[str]()
    for one in documents:
        split = home.get(one.sha256)
        if one.split not in (None, split):
            left_out["equal to one of another split"] += 1
        elif deduplicate and one.sha256 in seen:
            left_out["duplicate"] += 1
        else:
            one.split = split
            kept.append(one)
            if deduplicate:
                seen.add(one.sha256)
    return kept, left_out


def _check(documents: list[Document], asked: dict[str, float], params: PrepareParams) -> None:
    """Raise UserError as split_documents says; `asked` are the bytes that splits should have which are not given."""
    source, sizes = params.source, {name: sum(one.size for one in documents if one.split == name) for name in SPLITS}
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"prepare.source {source}: no text is left for the {name} split; give more documents, or a longer text"
            )
        if name in asked and size > max(MOST_OVER * asked[name], sizes["train"]):
            largest = max((one for one in documents if one.split == name), key=lambda one: one.size).name
            fraction = getattr(params, f"{name}_fraction")
            raise UserError(
                f"prepare.{name}_fraction {fraction} would become {fraction * size / asked[name]:.2g} with {largest}: "
                "cut that text into smaller ones, or give the splits (prepare.splits)"
            )
