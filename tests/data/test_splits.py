"""Fractions hold to within a document; given splits are kept; equal documents are never in two splits."""

import hashlib
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.data import splits as module
from gpt2.data.splits import SPLITS, Document, split_documents

ErrorLine = Callable[[Callable[[], object]], str]
LINES = "".join(f"line {i}, ünïcödé 日本 👧\r\n" for i in range(500))
Texts = Sequence[str | tuple[str, str | None]]


@pytest.fixture(scope="session")
def split(make_prepare_params: Callable[..., PrepareParams]) -> Callable[..., tuple[list[Document], Counter[str], Any]]:
    """Split texts, some with a given split; return the documents, what is left out, and the text of each document."""

    def run(texts: Texts, val: float = 0.1, test: float = 0.1, **changes: Any) -> Any:
        file, documents = tempfile.TemporaryFile(buffering=0), []  # noqa: SIM115
        for number, one in enumerate(texts):
            text, name = one if isinstance(one, tuple) else (one, None)
            data = text.encode()
            documents.append(Document(str(number), file.tell(), len(data), hashlib.sha256(data).digest(), name))
            file.write(data)
        params = make_prepare_params("data/raw", val_fraction=val, test_fraction=test, **changes)
        found, left_out = split_documents(documents, file, params)
        assert all(hashlib.sha256(one.read(file.fileno())).digest() == one.sha256 for one in found)
        return found, left_out, [one.read(file.fileno()).decode() for one in found]

    return run


Split = Callable[..., tuple[list[Document], Counter[str], list[str]]]


def sizes_of(documents: list[Document]) -> dict[str, int]:
    return {name: sum(one.size for one in documents if one.split == name) for name in SPLITS}


@given(
    lines=st.lists(st.integers(1, 2000), min_size=1, max_size=30), val=st.floats(0.01, 0.4), test=st.floats(0.01, 0.4)
)
def test_fractions_hold_to_within_a_document_for_all_sizes(
    lines: list[int], val: float, test: float, split: Split
) -> None:
    texts = ["".join(f"{file} {line}\n" for line in range(count)) for file, count in enumerate(lines)]
    try:
        documents, _, parts = split(texts, val, test)
    except UserError:
        assert sum(lines) < 10 / min(val, test)
        return
    assert "".join(parts) == "".join(texts) and all(part.endswith("\n") for part in parts)
    total, largest = sum(one.size for one in documents), max(one.size for one in documents)
    is_used_up = sum(one.split == "train" for one in documents) == 1  # which train keeps, whatever val still lacks
    for name, fraction in (("val", val), ("test", test)):
        short = largest if is_used_up else 1e-6
        assert fraction * total - short <= sizes_of(documents)[name] <= fraction * total + largest
    assert largest <= min(val, test) * total + 1 or largest < 20  # a line


@pytest.mark.parametrize("sizes", [[500], [1, 1, 498], [400, 50, 50], [3] * 150])
def test_unbalanced_folders_are_split_by_the_fractions(split: Split, sizes: list[int]) -> None:
    lines = iter(LINES.splitlines(keepends=True))
    documents, _, _ = split(["".join(itertools.islice(lines, size)) for size in sizes], 0.05, 0.05)
    held, total = sizes_of(documents), sum(one.size for one in documents)
    assert 0.05 <= held["val"] / total < 0.065 and 0.05 <= held["test"] / total < 0.065


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        "".join(f"{i}\n" for i in range(400)),
        "a\nb\nc",
        "".join(f"{i} {'long ' * 50}\n" for i in range(5)),
        "日" * 9 + "\nb\nc\n",
    ],
)
def test_lone_text_is_cut_at_line_ends(split: Split, text: str) -> None:
    _, _, parts = split([text], 0.05, 0.05)
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts[:-1])
    assert len(parts) == min(100, text.count("\n") + (not text.endswith("\n")))


def test_a_text_that_is_given_for_test_is_not_cut_and_trained_on(split: Split) -> None:
    others = LINES.replace("1", "one")
    documents, left_out, _ = split([(LINES, "train"), (others, "train"), (LINES, "test")], 0.1, 0.1)
    sizes = sizes_of(documents)
    assert (sizes["test"], sizes["train"] + sizes["val"]) == (len(LINES.encode()), len(others.encode()))
    assert left_out["equal to one of another split"] == 1


def test_sections_are_of_about_equal_size_and_named_by_their_bytes(split: Split) -> None:
    documents, _, _ = split([LINES], 0.05, 0.05)
    sizes = [one.size for one in documents]
    assert max(sizes) <= 2 * min(sizes)
    assert documents[1].name == f"0[{sizes[0]}:{sizes[0] + sizes[1]}]"


@given(text=st.text(st.sampled_from("aé日👧\n\r"), min_size=1), longest=st.integers(1, 9))
def test_long_lines_are_cut_between_characters(text: str, longest: int, split: Split) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST_LINE", longest)
        try:
            _, _, parts = split([text])
        except UserError:
            assert len(text.encode()) <= 12 * longest
        else:
            assert "".join(parts) == text and all(parts)


def test_split_follows_the_texts_not_their_order(split: Split) -> None:
    texts = [f"text {i} " * (1 + i % 5) for i in range(50)]
    documents, _, parts = split(texts)
    found = dict(zip(parts, (one.split for one in documents), strict=True))
    random.Random(1).shuffle(texts)
    documents, _, parts = split(texts)
    assert [one.split for one in documents] == [found[part] for part in parts]


def test_the_largest_rows_are_trained_on(split: Split) -> None:
    documents, _, _ = split(["x" * 980, *map(str, range(20))], 0.05, 0.05)
    assert documents[0].split == "train"


def test_given_splits_are_kept_and_the_missing_drawn_from_the_rest(split: Split) -> None:
    for given_split in SPLITS:
        documents, _, _ = split([*(f"text {i}" for i in range(60)), ("named " * 20, given_split)])
        assert documents[-1].split == given_split and sizes_of(documents).keys() == set(SPLITS)
        assert all(one.split != given_split or given_split == "train" for one in documents[:-1])
        assert all(sizes_of(documents).values())


def test_a_missing_split_is_drawn_from_train_where_all_are_named(split: Split) -> None:
    documents, _, parts = split([(LINES, "train"), ("x" * 500, "val")])
    assert "".join(part for one, part in zip(documents, parts, strict=True) if one.split == "val") == parts[-1]
    assert sizes_of(documents)["test"] / len(LINES.encode()) == pytest.approx(0.11, abs=0.015)
    large = [
        *((f"row {i} of train", "train") for i in range(100)),
        *((f"row {i} of test" * 9, "test") for i in range(300)),
    ]
    documents, _, _ = split(large)  # the fraction is of train, whatever is given for test
    assert Counter(one.split for one in documents)["val"] == pytest.approx(10, abs=1)
    documents, left_out, _ = split([(LINES, "train"), ("x", "val"), ("y", "test")])
    assert [one.split for one in documents] == ["train", "val", "test"] and not left_out


DUPLICATES = st.lists(st.tuples(st.integers(0, 12), st.sampled_from((None, None, *SPLITS))), min_size=3, max_size=60)


@given(numbers=DUPLICATES, deduplicate=st.booleans())
def test_equal_documents_are_never_in_two_splits_and_none_is_lost(
    numbers: list[tuple[int, str | None]], deduplicate: bool, split: Split
) -> None:
    texts = [(f"text {number:02}", given_split) for number, given_split in numbers]
    try:
        documents, left_out, parts = split(texts, 0.2, 0.2, deduplicate=deduplicate)
    except UserError:
        return
    found = {(part, one.split) for one, part in zip(documents, parts, strict=True)}
    assert len(found) == len(set(parts)) == len({text for text, _ in texts})
    assert len(documents) + sum(left_out.values()) == len(texts)
    if deduplicate:
        assert len(documents) == len(found)
    elif len({given_split for _, given_split in texts} - {None}) < 2:
        assert not left_out
    for text, given_split in texts:
        if given_split == "test":
            assert (text, "test") in found


@pytest.mark.parametrize("texts", [["some"], ["one", "two"], ["same"] * 9, [("a\nb\nc\n", "val")], []])
def test_split_without_text_is_refused(split: Split, error_line: ErrorLine, texts: Texts) -> None:
    assert "prepare.source data/raw: no text is left for the " in error_line(lambda: split(texts))


def test_row_too_large_for_its_split_is_named(split: Split, error_line: ErrorLine) -> None:
    line = error_line(lambda: split([("x", "train"), "y" * 9, "z" * 90], 0.05, 0.05))
    assert "prepare.val_fraction 0.05 would become 0.91 with 2: cut that text into smaller ones" in line
